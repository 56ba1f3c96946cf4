//! Tries, from within actions of a real pipeline in the default sandbox, to see and to change what is not theirs.
//!
//! The sandbox's own tests try far more, one by one; here it is the whole product, as it is set up by default.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::path::Path;

use sealci_tests::host::{Footprint, network_links, processes_with};
use sealci_tests::{Installation, Part, Repository, action, eventually, let_go};

/// For scripts that would do harm outside: never in another executor, should the default be another one.
const SEALED: &str = "configuration: {executor: sandbox}";
/// And a second look, from within.
const GUARD: &str = "test \"$(cat /proc/1/comm)\" = sealci-init || exit 99";

/// One action with a script as its only command.
fn action_of(name: &str, settings: &str, script: &str) -> String {
    let mut text = format!("  {name}:\n    needs: []\n");
    for line in settings.lines() {
        text.push_str(&format!("    {line}\n"));
    }
    text.push_str("    commands:\n      - |\n");
    for line in script.lines() {
        text.push_str(&format!("        {line}\n"));
    }
    text
}

fn manifest(actions: &[String]) -> String {
    format!("name: sealed\nactions:\n{}", actions.concat())
}

/// Lines `name value` of a log.
fn facts(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(' ')).collect()
}

#[test]
fn nothing_of_the_host_is_seen() {
    let Some(installation) = Installation::start_sealed("nothing_of_the_host_is_seen") else { return };
    let data = installation.data();
    let secret = installation.scratch("secret");
    fs::write(&secret, "of the host").unwrap();
    let home = tempfile::tempdir_in("/root").unwrap();
    fs::write(home.path().join("secret"), "of root").unwrap();
    let script = format!(
        "for path in {secret} {data} {data}/admin.token {data}/agent /var{data} /proc/1/root{data} {home} /etc/shadow \
           /etc/ssh /boot /var/lib/dpkg /run/docker.sock /run/sealci/network-0.lock /sys/kernel /sys/fs/cgroup \
           /dev/sda /dev/kmsg /dev/kvm /dev/mem; do\n\
           if ls -d \"$path\" >/dev/null 2>&1; then echo \"seen $path\"; fi\ndone\n\
         for folder in /root /home /mnt /opt /srv /sys /var/lib; do ls -A $folder | sed \"s|^|seen $folder/|\"; done\n\
         for path in /proc/kcore /proc/1/environ /proc/1/mem /proc/keys /dev/tty; do\n\
           if head -c 1 $path 2>/dev/null | grep -q .; then echo \"read $path\"; fi\ndone\n\
         for fd in /proc/self/fd/*; do readlink $fd | grep -F {data} || true; done\n\
         env | grep -iE 'token|secret|credential|SEALCI_DATA' || true\n\
         echo over",
        secret = secret.display(),
        data = data.display(),
        home = home.path().display(),
    );
    let number = installation.submit_manifest("repository", &manifest(&[action_of("look", "", &script)]));
    let pipeline = installation.finished(&number);
    assert_eq!(installation.text(&number, "look"), "over\n");
    assert_eq!(pipeline["outcome"], "succeeded");
    assert_eq!(action(&pipeline, "look")["attempts"][0]["executor"], "sandbox", "the default is the sandbox");
}

#[test]
fn nothing_outside_the_workspace_is_changed() {
    let Some(installation) = Installation::start_sealed("nothing_outside_the_workspace_is_changed") else {
        return;
    };
    let mark = format!("sealci-test-{}", std::process::id());
    let folders = "/ /usr /usr/bin /usr/lib /bin /etc /etc/ssl /var /var/lib /opt /dev /dev/shm /run /run/sealci /proc \
        /proc/sys/kernel /sys /home /root /tmp /mnt /srv /boot";
    let script = format!(
        "{GUARD}\n\
         for folder in {folders}; do {{ echo x >$folder/{mark}; }} 2>/dev/null || true; done\n\
         for path in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/sys/vm/drop_caches; do\n\
           if {{ echo 1 >$path; }} 2>/dev/null; then echo \"wrote $path\"; fi\ndone\n\
         if {{ echo -1000 >/proc/self/oom_score_adj; }} 2>/dev/null; then echo 'is spared from the want of memory'; fi\n\
         for call in 'mount -t tmpfs none /mnt' 'mount --bind / /mnt' 'umount /proc' 'unshare --user true' \
           'unshare --mount true' 'chroot / true' 'mknod /tmp/disk b 8 0' 'hostname other' 'date -s 2000-01-01'; do\n\
           if $call >/dev/null 2>&1; then echo \"did $call\"; fi\ndone\n\
         echo kept >/workspace/{mark} && echo over"
    );
    // The second one has everything of the first one's thrown away.
    let look = format!(
        "for folder in {folders} /workspace; do ls $folder/{mark} 2>/dev/null || true; done; env true; echo over"
    );
    let text = manifest(&[action_of("change", SEALED, &script)]);
    let number = installation.submit_manifest("first", &text);
    installation.finished(&number);
    assert_eq!(installation.text(&number, "change"), "over\n");
    for folder in folders.split_whitespace() {
        let path = Path::new(folder).join(&mark);
        assert!(!path.exists(), "{}", path.display());
    }
    let number = installation.submit_manifest("second", &manifest(&[action_of("look", "", &look)]));
    assert_eq!(installation.finished(&number)["outcome"], "succeeded");
    assert_eq!(installation.text(&number, "look"), "over\n");
}

#[test]
fn there_are_no_privileges_and_no_other_processes() {
    let Some(installation) = Installation::start_sealed("there_are_no_privileges_and_no_other_processes")
    else {
        return;
    };
    let script = "\
        sed -n 's/^\\(Cap[A-Za-z]*\\|Seccomp\\|NoNewPrivs\\):[[:space:]]*/\\1 /p' /proc/self/status\n\
        echo first $(cat /proc/1/comm)\n\
        echo seccomp_of_first $(sed -n 's/^Seccomp:[[:space:]]*//p' /proc/1/status)\n\
        echo processes $(ls -d /proc/[0-9]* | wc -l)\n\
        echo user $(id -u) $(awk '{ print ($2 > 0) }' /proc/self/uid_map)\n\
        cp /bin/id id && chmod 6755 id && echo setuid $(./id -u)\n";
    let number = installation.submit_manifest("repository", &manifest(&[action_of("look", "", script)]));
    let pipeline = installation.finished(&number);
    let text = installation.text(&number, "look");
    assert_eq!(pipeline["outcome"], "succeeded", "{text}");
    let facts = facts(&text);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(facts[set], "0000000000000000", "{set}");
    }
    for (name, expected) in
        [("Seccomp", "2"), ("NoNewPrivs", "1"), ("first", "sealci-init"), ("seccomp_of_first", "2")]
    {
        assert_eq!(facts[name], expected, "{name}");
    }
    assert_eq!(facts["user"], "0 1", "root's inside, and nobody's outside");
    assert_eq!(facts["setuid"], "0");
    let processes: u32 = facts["processes"].parse().unwrap();
    assert!(processes < 8, "only its own: {processes}");
}

#[test]
fn actions_do_not_see_each_other() {
    let Some(installation) = Installation::start_sealed("actions_do_not_see_each_other") else { return };
    let owner = "\
        for folder in /workspace /tmp /root /dev/shm /run/sealci/scratch /var/lib /usr/local; do\n\
          { echo of-the-owner >$folder/private; } 2>/dev/null || true\ndone\n\
        sleep 600 &\n\
        touch begun; while ! test -e go; do sleep 0.05; done";
    let other = "\
        test \"$(cat /proc/1/comm)\" = sealci-init || exit 99\n\
        for folder in /workspace /tmp /root /dev/shm /run/sealci/scratch /var/lib /usr/local; do\n\
          if test -e $folder/private; then echo \"seen $folder/private\"; fi\ndone\n\
        grep -l of-the-owner /proc/[0-9]*/environ 2>/dev/null || true\n\
        grep -lz '^sleep$' /proc/[0-9]*/cmdline 2>/dev/null || true\n\
        kill -9 -1 2>/dev/null || true\n\
        echo over";
    let owner = manifest(&[action_of("owner", "env: {MARK: of-the-owner}", owner)]);
    let first = installation.submit_manifest("first", &owner);
    let workspace = installation.workspace_with("begun");
    let second = installation.submit_manifest("second", &manifest(&[action_of("other", SEALED, other)]));
    assert_eq!(installation.finished(&second)["outcome"], "succeeded");
    assert_eq!(installation.text(&second, "other"), "over\n");
    assert_eq!(installation.json(&["show", &first])["state"], "running", "it was not harmed");
    let_go(&workspace, "go");
    assert_eq!(installation.finished(&first)["outcome"], "succeeded");
}

#[test]
fn nothing_of_an_action_is_left_on_the_host() {
    let Some(installation) = Installation::start_sealed("nothing_of_an_action_is_left_on_the_host") else {
        return;
    };
    let mark = format!("E2E_MARK=left-{}", std::process::id());
    let daemons = "\
        setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 600; done' </dev/null >/dev/null 2>&1 &\n\
        (setsid sh -c '(trap \"\" TERM; sleep 600) &' &)\n\
        nohup sleep 600 >/dev/null 2>&1 &\n\
        touch begun; while ! test -e go; do sleep 0.05; done";
    for (network, ending) in [("on", "let go"), ("off", "let go"), ("on", "cancelled")] {
        let settings =
            format!("env: {{E2E_MARK: left-{}}}\nconfiguration: {{network: {network}}}", std::process::id());
        let agent = installation.pid(Part::Agent);
        if network == "on" && network_links(agent).is_none() {
            sealci_tests::skip("netfilter", "network: on", "the agent has no way outwards for its sandboxes");
            continue;
        }
        let name = format!("{network} {ending}").replace(' ', "-");
        let number =
            installation.submit_manifest(&name, &manifest(&[action_of("daemons", &settings, daemons)]));
        let workspace = installation.workspace_with("begun");
        let footprint = eventually("the action's processes", || {
            let marked = processes_with(&mark);
            marked.into_iter().find_map(Footprint::of).filter(|_| processes_with(&mark).len() >= 4)
        });
        assert!(footprint.is_sealed(), "{footprint:?}");
        assert!(!footprint.left().is_empty(), "the look itself sees what is there");
        if network == "on" {
            assert_eq!(network_links(agent).map(|links| links.len()), Some(1));
        }
        match ending {
            "let go" => let_go(&workspace, "go"),
            _ => assert!(installation.sealci(&["cancel", &number]).status.success()),
        }
        let expected = if ending == "let go" { "succeeded" } else { "cancelled" };
        assert_eq!(installation.finished(&number)["outcome"], expected);
        // The agent says that it holds nothing any more once it has cleared up.
        eventually(&format!("all of {name} to be gone"), || {
            let left =
                [footprint.left(), processes_with(&mark).iter().map(u32::to_string).collect()].concat();
            let gone = left.is_empty()
                && network_links(agent).is_none_or(|links| links.is_empty())
                && !workspace.exists();
            if !gone {
                eprintln!("still there: {left:?}");
            }
            gone.then_some(())
        });
    }
}

/// This host's own address on the way outwards, if there is a way. Nothing is sent.
fn outer_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.123:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

#[test]
fn the_host_and_the_clouds_metadata_are_out_of_reach() {
    let Some(installation) = Installation::start_sealed("the_host_and_the_clouds_metadata_are_out_of_reach")
    else {
        return;
    };
    let mut addresses: Vec<IpAddr> = vec!["127.0.0.1".parse().unwrap()];
    addresses.extend(outer_address());
    let listeners: Vec<TcpListener> =
        addresses.iter().map(|address| TcpListener::bind((*address, 0)).unwrap()).collect();
    let mut places: Vec<String> = Vec::new();
    for listener in &listeners {
        let address = listener.local_addr().unwrap();
        // From the host it is reached, so it is the sandbox that stands in the way.
        drop(std::net::TcpStream::connect(address).unwrap());
        drop(listener.accept().unwrap());
        listener.set_nonblocking(true).unwrap();
        places.push(format!("{}/{}", address.ip(), address.port()));
        // The gateway is the host, too.
        places.push(format!("$gateway/{}", address.port()));
    }
    places.push("169.254.169.254/80".to_owned());
    let tries: String = places
        .iter()
        .map(|place| {
            format!("(if timeout 1 bash -c \": </dev/tcp/{place}\" 2>/dev/null; then echo \"reached {place}\"; fi) &\n")
        })
        .collect();
    let script = format!(
        "echo interfaces $(sed -n 's/^ *\\([a-z0-9]*\\):.*/\\1/p' /proc/net/dev | sort)\n\
         hex=$(awk '$2 == \"00000000\" {{ print $3 }}' /proc/net/route)\n\
         gateway=127.0.0.1\n\
         if test -n \"$hex\"; then\n\
           gateway=$(printf '%d.%d.%d.%d' $(echo $hex | sed 's/\\(..\\)\\(..\\)\\(..\\)\\(..\\)/0x\\4 0x\\3 0x\\2 0x\\1/'))\n\
         fi\n\
         export gateway; echo gateway $gateway\n{tries}wait; echo over yes"
    );
    let mut actions = vec![action_of("offline", "configuration: {network: off}", &script)];
    let has_network = network_links(installation.pid(Part::Agent)).is_some();
    if has_network {
        actions.push(action_of("online", "configuration: {network: on}", &script));
    } else {
        sealci_tests::skip("netfilter", "network: on", "the agent has no way outwards for its sandboxes");
    }
    let repository = Repository::with_manifest(installation.scratch("repository"), &manifest(&actions));
    let number = installation.submit(&repository);
    assert_eq!(installation.finished(&number)["outcome"], "succeeded");
    let offline = installation.text(&number, "offline");
    assert_eq!(offline, "interfaces lo\ngateway 127.0.0.1\nover yes\n");
    if has_network {
        let online = installation.text(&number, "online");
        let facts = facts(&online);
        assert_eq!(facts["interfaces"], "eth0 lo");
        assert!(facts["gateway"].starts_with("10."), "there is a way outwards: {online}");
        assert!(!online.contains("reached") && facts["over"] == "yes", "{online}");
    }
    for listener in &listeners {
        let came = listener.accept().map(|(_, from)| from);
        assert!(came.is_err(), "{came:?} came through");
    }
}

/// From the manifest to the log, whatever there is outside.
#[test]
fn what_is_not_on_an_actions_list_is_refused_and_said() {
    let test = "what_is_not_on_an_actions_list_is_refused_and_said";
    let Some(installation) = Installation::start_sealed(test) else { return };
    if network_links(installation.pid(Part::Agent)).is_none() {
        sealci_tests::skip("netfilter", test, "the agent has no way outwards for its sandboxes");
        return;
    }
    // Of the block that RFC 5737 keeps for documentation: nobody is there.
    let settings = "configuration: {network: {allow: [\"192.0.2.7:4\", packages.invalid]}}";
    let script = "timeout 5 bash -c ': </dev/tcp/192.0.2.8/4' 2>/dev/null || test $? = 1\necho refused\n\
                  getent hosts other.invalid || echo nobody\n\
                  timeout 1 bash -c ': </dev/tcp/192.0.2.7/4' 2>/dev/null || true\n\
                  echo over";
    let actions = [action_of("held", settings, script)];
    let repository = Repository::with_manifest(installation.scratch("repository"), &manifest(&actions));
    let number = installation.submit(&repository);
    assert_eq!(installation.finished(&number)["outcome"], "succeeded");
    let text = installation.text(&number, "held");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..3], ["refused", "nobody", "over"], "{text}");
    let said = &lines[3..];
    assert_eq!(said[0], "sealci: network: refused: 192.0.2.8:4 is not what the action may reach", "{text}");
    assert!(said[1].starts_with("sealci: network: refused: the name other.invalid is not what"), "{text}");
    // Programs may look for the name below a domain of their own, too.
    assert!(said[said.len() - 1].starts_with("sealci: network: connected to 192.0.2.7:4"), "{text}");
    assert!(said.iter().all(|line| line.starts_with("sealci: network: ")), "{text}");
}
