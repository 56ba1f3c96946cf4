//! What an action in the sandbox must not be able to do, tried from inside.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sealci_core::outcome::{Cause, Outcome};

use crate::ending::mentioned_in_any_mounts;
use crate::lab::{Lab, Record, until_output};

pub async fn script(lab: &Lab, text: &str) -> Record {
    let record = lab.run_commands([text]).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    record
}

pub async fn nothing_of_the_host_is_seen(lab: &Lab) {
    std::fs::write(lab.folder.path().join("secret"), "of the agent").unwrap();
    let record = script(
        lab,
        "ls -A / | tr '\\n' ' '; echo; ls -A /home /root /var/lib /opt /mnt /srv /sys /workspace",
    )
    .await;
    let top: HashSet<&str> = record.text().lines().next().unwrap().to_owned().leak().split(' ').collect();
    for name in top {
        let known = [
            "bin",
            "dev",
            "etc",
            "home",
            "lib",
            "lib32",
            "lib64",
            "libx32",
            "mnt",
            "opt",
            "proc",
            "root",
            "run",
            "sbin",
            "srv",
            "sys",
            "tmp",
            "usr",
            "var",
            "workspace",
            "",
        ];
        assert!(known.contains(&name), "/{name} is seen");
    }
    for line in record.text().lines().skip(1) {
        assert!(line.is_empty() || line.ends_with(':'), "{line} is seen");
    }
    // By any road: its path, other processes' roots and descriptors, and the mounts' own paths.
    let folder = lab.folder.path().display().to_string();
    let record = script(
        lab,
        &format!(
            "for path in {folder}/secret /etc/shadow /proc/1/root{folder} /proc/self/root{folder} /old_root /var/run/docker.sock; do \
             if [ -e $path ]; then echo seen $path; fi; done; \
             ls -l /proc/self/fd /proc/1/fd /proc/1/cwd/ 2>/dev/null | grep -F {folder} || true; \
             ls -d /proc/[0-9]* | wc -l"
        ),
    )
    .await;
    let text = record.text();
    let processes: u32 = text.trim().parse().unwrap_or_else(|_| panic!("{text}"));
    assert!(processes <= 5, "only its own processes: {text}");
}

pub async fn nothing_of_the_host_is_changed(lab: &Lab) {
    let marker = format!("sealci-test-{}", crate::lab::random_action());
    // It may write everywhere, and that is thrown away; or it may not.
    let record = script(
        lab,
        &format!(
            "for d in / /usr /usr/bin /etc /var /opt /dev /run /proc /sys /home /lib/ /bin/ /etc/ssl /etc/alternatives; do \
             {{ echo x >$d/{marker}; }} 2>/dev/null || true; done; \
             rm -f /usr/bin/env; ln -s /bin/false /usr/bin/awk2; ! test -e /usr/bin/env; echo x >>/etc/passwd; \
             test -w /usr/local/bin && cp /bin/echo /usr/local/bin/{marker} && {marker} installed"
        ),
    )
    .await;
    assert_eq!(record.text(), "installed\n");
    assert!(Path::new("/usr/bin/env").exists());
    for folder in [
        "/",
        "/usr",
        "/usr/bin",
        "/usr/local/bin",
        "/etc",
        "/var",
        "/opt",
        "/dev",
        "/run",
        "/home",
        "/lib",
        "/etc/ssl",
    ] {
        assert!(!Path::new(folder).join(&marker).exists(), "{folder}");
    }
    let record = script(lab, &format!("ls /usr/local/bin/{marker} 2>/dev/null || echo gone")).await;
    assert_eq!(record.text(), "gone\n");
    for path in ["/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger"] {
        let record = lab.run_commands([format!("echo x >{path}")]).await;
        assert!(matches!(record.outcome(), Outcome::Failed { .. }), "{path}: {}", record.text());
    }
}

pub async fn there_are_no_privileges(lab: &Lab) {
    let record = script(
        lab,
        "id -u; grep -E '^(Cap|NoNewPrivs|Uid|Gid|Groups)' /proc/self/status; cat /proc/self/uid_map",
    )
    .await;
    let text = record.text();
    assert!(text.starts_with("0\n"), "{text}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(text.contains(&format!("{set}:\t0000000000000000\n")), "{text}");
    }
    assert!(text.contains("NoNewPrivs:\t1\n"), "{text}");
    let mapped: Vec<u32> =
        text.lines().last().unwrap().split_whitespace().map(|n| n.parse().unwrap()).collect();
    if nix::unistd::geteuid().is_root() {
        assert!(mapped[0] == 0 && mapped[1] >= 524_288 && mapped[2] == 65536, "{text}");
    } else {
        // One id alone, the user's own.
        assert_eq!(mapped, [0, 0, 1], "{text}");
    }
    for forbidden in [
        "mount -t tmpfs none /mnt",
        "mount --bind / /mnt",
        "umount /proc",
        "unshare --user true",
        "unshare --mount true",
        "chroot / true",
        "mknod /tmp/sda b 8 0",
        "hostname other",
        "nsenter --target 1 --mount true",
        "date -s 2000-01-01",
        "chown 1 /workspace",
        "setpriv --reuid 1 true",
        "cat /proc/1/environ",
        "readlink /proc/1/fd/0",
        "readlink /proc/1/exe",
        // Absent on some kernels, and masked as an empty file on the others.
        "grep -q . /proc/kcore",
    ] {
        let record = lab.run_commands([forbidden]).await;
        assert!(matches!(record.outcome(), Outcome::Failed { .. }), "{forbidden}: {}", record.text());
        assert!(!record.text().contains("not found"), "{forbidden}: {}", record.text());
    }
    // A file's setuid bit gives nothing.
    let record =
        script(lab, "cp /bin/id ./id && chmod 6755 id && ./id -u && grep CapEff /proc/self/status").await;
    assert!(record.text().ends_with("CapEff:\t0000000000000000\n"), "{}", record.text());
}

pub async fn system_calls_are_filtered(lab: &Lab) {
    let record = script(lab, "grep -E '^Seccomp' /proc/self/status /proc/1/status").await;
    let text = record.text();
    assert!(
        text.contains("/proc/self/status:Seccomp:\t2\n") && text.contains("/proc/1/status:Seccomp:\t2\n"),
        "{text}"
    );
    assert!(text.contains("Seccomp_filters:\t2\n"), "{text}");
    if !Path::new("/usr/bin/perl").exists() {
        eprintln!("SKIPPED: without perl, single system calls are not tried");
        return;
    }
    // Number, arguments, and the expected errno on x86-64.
    for (call, errno) in [
        ("272, 0x10000000", libc_errno::EPERM), // unshare(CLONE_NEWUSER)
        ("56, 0x10000000 | 17, 0, 0, 0, 0", libc_errno::EPERM), // clone(CLONE_NEWUSER)
        ("435, 0, 0", libc_errno::ENOSYS),      // clone3
        ("321, 0, 0, 0", libc_errno::EPERM),    // bpf
        ("250, 0, 0, 0, 0, 0", libc_errno::EPERM), // keyctl
        ("425, 1, 0", libc_errno::ENOSYS),      // io_uring_setup
        ("41, 40, 1, 0", libc_errno::EPERM),    // socket(AF_VSOCK)
        ("41, 38, 5, 0", libc_errno::EPERM),    // socket(AF_ALG)
        ("16, 0, 0x5412, 0", libc_errno::EPERM), // ioctl(TIOCSTI)
        ("0x40000000 | 39", libc_errno::ENOSYS), // x32 getpid
        ("999", libc_errno::ENOSYS),
    ] {
        if !cfg!(target_arch = "x86_64") {
            break;
        }
        let record =
            script(lab, &format!("perl -e '$r = syscall({call}); print $r == -1 ? $!+0 : \"allowed $r\"'"))
                .await;
        assert_eq!(record.text(), errno.to_string(), "syscall({call})");
    }
}

mod libc_errno {
    pub const EPERM: i32 = 1;
    pub const ENOSYS: i32 = 38;
}

pub async fn namespaces_are_its_own(lab: &Lab) {
    let record = script(lab, "cd /proc/self/ns; for n in cgroup ipc mnt net pid user uts; do readlink $n; done; cat /proc/self/cgroup").await;
    let text = record.text();
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let ours = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        let theirs = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")))
            .unwrap_or_else(|| panic!("{text}"));
        assert_ne!(theirs, ours.to_str().unwrap(), "{name}");
    }
    // The limited groups, seen as roots: nothing above them can be named.
    for line in text
        .lines()
        .filter(|line| line.contains(":memory:") || line.contains(":pids:") || line.starts_with("0::"))
    {
        assert!(line.ends_with(":/"), "{line}");
    }
}

pub async fn the_network_is_off(lab: &Lab) {
    // A listener of the host, on loopback.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut request = lab.request([
        "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '".to_owned(),
        format!(
            "if (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; then echo reached; else echo refused; fi"
        ),
        "if (exec 3<>/dev/tcp/1.1.1.1/53) 2>/dev/null; then echo reached; else echo unreachable; fi"
            .to_owned(),
    ]);
    request.shell = sealci_agent::executor::ShellKind::Bash;
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    assert_eq!(record.text(), "lo\nrefused\nunreachable\n");
    // Its own loopback works.
    if Path::new("/usr/bin/perl").exists() {
        let record = script(lab, "perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(Listen => 1, LocalAddr => \"127.0.0.1\") or die $!; \
            $c = IO::Socket::INET->new(PeerAddr => \"127.0.0.1\", PeerPort => $l->sockport) or die $!; print \"talks\"'").await;
        assert_eq!(record.text(), "talks");
    }
}

pub async fn common_tools_work(lab: &Lab) {
    let record = script(
        lab,
        "test \"$HOME\" = /root; cd; pwd; echo x >$TMPDIR/x; cat /var/tmp/x; stat -c %U:%G /workspace /usr/bin /etc/passwd /tmp / | sort -u; \
         touch /dev/shm/x; echo x >/dev/null; head -c 4 /dev/urandom | wc -c; test -w /dev/full; \
         sed --version | head -1 | cut -c1-3; uname -s; cat /etc/hostname | wc -l; getent hosts localhost | wc -l",
    )
    .await;
    assert_eq!(record.text(), "/root\nx\nroot:root\n4\nsed\nLinux\n1\n1\n");
    if Path::new("/usr/bin/git").exists() {
        let record = script(lab, "cd /workspace && git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m x && git log --oneline | wc -l").await;
        assert_eq!(record.text(), "1\n");
    }
    if Path::new("/usr/bin/cc").exists() {
        let record = script(lab, "echo 'int puts(const char *); int main(void) { return puts(\"compiled\") < 0; }' >a.c && cc a.c -o a && ./a").await;
        assert_eq!(record.text(), "compiled\n");
    }
    if Path::new("/usr/bin/script").exists() {
        let record = script(lab, "script -qec 'tty >/dev/null && echo terminal' /dev/null").await;
        assert_eq!(record.text().trim(), "terminal");
    }
}

pub async fn the_workspace_stays_the_agents(lab: &Lab) {
    let request = lab.request([
        "cat given && echo changed >given && mkdir -p a/b && echo new >a/b/c && ln -s /etc/shadow link",
    ]);
    let workspace = request.workspace.clone();
    std::fs::write(workspace.join("given"), "given\n").unwrap();
    let owner = std::fs::metadata(workspace.join("given")).unwrap().uid();
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(record.text(), "given\n");
    assert_eq!(std::fs::read_to_string(workspace.join("given")).unwrap(), "changed\n");
    assert_eq!(std::fs::read_to_string(workspace.join("a/b/c")).unwrap(), "new\n");
    // Where mounts cannot map owners root's agent gives the workspace away.
    let is_given_away =
        nix::unistd::geteuid().is_root() && !sealci_sandbox::maps_owners(lab.folder.path(), 1 << 20);
    assert!(is_given_away || std::fs::metadata(workspace.join("a/b/c")).unwrap().uid() == owner);
}

pub async fn extra_paths_are_seen_read_only(lab: &Lab) {
    let shown = lab.shown.path();
    let record = script(lab, &format!("cat {0}/tool && ! echo x >{0}/tool; ls {0}", shown.display())).await;
    assert!(record.text().starts_with("a tool\n"), "{}", record.text());
    assert!(record.text().ends_with("tool\n"), "{}", record.text());
    assert_eq!(std::fs::read_to_string(shown.join("tool")).unwrap(), "a tool\n");
}

pub async fn nothing_is_left(lab: &Lab) {
    let request = lab.request(["readlink /proc/self/ns/net; echo up; sleep 1000"]);
    let (attempt, scratch) = (request.attempt.to_string(), request.scratch.clone());
    let mut execution = lab.start(request).await;
    let record = until_output(&mut execution, "up\n").await;
    let network = record.text().lines().next().unwrap().to_owned();
    assert!(mentioned_in_any_mounts(&attempt) && in_network(&network));
    let in_groups =
        |attempt: &str| lab.cgroup_folders.iter().filter(|folder| folder.join(attempt).exists()).count();
    assert_eq!(in_groups(&attempt), lab.cgroup_folders.len());
    execution.handle().kill();
    while execution.next().await.is_some() {}
    assert!(!mentioned_in_any_mounts(&attempt), "a mount is left");
    assert!(!in_network(&network), "somebody is left in its network");
    assert_eq!(in_groups(&attempt), 0, "a control group is left");
    // The caller can delete what was the action's.
    sealci_agent::workspace::remove_tree(&scratch).unwrap();
}

fn in_network(network: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        std::fs::read_link(entry.path().join("ns/net")).is_ok_and(|link| link.to_str() == Some(network))
    })
}

/// A container that cannot be made must take nothing with it. libcontainer's own clean-up would, as root, kill the whole
/// machine; so this runs in a PID namespace, where it could only kill the test.
pub async fn a_failed_start_hurts_nobody(lab: &Lab) {
    const TEST: &str = "SEALCI_TEST_CONFINED";
    assert!(lab.limits);
    if std::env::var_os(TEST).is_none() {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let confined = std::process::Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture", "--test-threads=1"])
            .env(TEST, "1")
            .output();
        match confined {
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success(), "{}: {text}", output.status);
                assert!(text.contains("the bystander lives"), "{text}");
            }
            Err(error) => eprintln!("SKIPPED: `unshare` (apt-get install util-linux): {error}"),
        }
        return;
    }
    let mut bystander = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    // Enough for the helper and one more: libcontainer fails halfway.
    let cramped = Lab::sandbox_with(false, 2).unwrap();
    let record = cramped.run_commands(["true"]).await;
    match record.outcome() {
        // The helper lived to tell: its own group is the first that such a clean-up may choose.
        Outcome::Errored { cause: Cause::Executor, message } => {
            assert!(message.contains("cannot make the sandbox's container"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(bystander.try_wait().unwrap(), None);
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    eprintln!("the bystander lives");
}

pub async fn the_init_is_out_of_reach(lab: &Lab) {
    let record = script(lab, "kill -9 1; kill -STOP 1; kill -TERM 1 2>/dev/null & echo alive").await;
    assert!(record.text().contains("alive"), "{}", record.text());
    let record = lab.run_commands(["echo x >/proc/1/mem"]).await;
    assert!(matches!(record.outcome(), Outcome::Failed { .. }), "{}", record.text());
}

/// On a machine where nobody made `/run/sealci` yet, whatever the mask.
pub async fn a_fresh_machine_will_do(lab: &Lab) {
    const TEST: &str = "SEALCI_TEST_FRESH";
    if std::env::var_os(TEST).is_some() {
        let record = lab.run_commands(["echo sealed"]).await;
        assert_eq!(record.text(), "sealed\n", "{:?}", record.outcome);
        return;
    }
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let fresh = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c"])
        .arg("umask 077 && mount -t tmpfs -o mode=755 none /run && exec \"$@\"")
        .arg("sh")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(TEST, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&fresh.stdout).into_owned() + &String::from_utf8_lossy(&fresh.stderr);
    assert!(fresh.status.success() && text.contains("1 passed"), "{text}");
}
