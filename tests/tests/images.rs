//! Runs actions in images, and services beside actions, in separate processes.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use sealci_tests::{Installation, Part, action, attempts, both, eventually, host, skip};

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 12] =
    ["sh", "cat", "echo", "id", "ls", "sleep", "env", "touch", "wget", "true", "false", "httpd"];

/// An installation whose agent has the image `docker-archive:busybox.tar`.
fn start(test: &str) -> Option<Installation> {
    if !Path::new(BUSYBOX).exists() {
        skip("registry", test, "busybox is not installed (apt-get install busybox-static)");
        return None;
    }
    // Asks whether actions are sealed here at all.
    Installation::start_sealed(test)?;
    let mut installation = Installation::none();
    let folder = installation.scratch("images");
    fs::create_dir_all(&folder).unwrap();
    save_image(&folder);
    let arguments = vec!["--images-folder".to_owned(), folder.display().to_string()];
    installation.arguments.insert(Part::Agent, arguments);
    installation.start_all();
    Some(installation)
}

/// Makes what `docker save` would: one layer with busybox in it.
fn save_image(folder: &Path) {
    let root = folder.join("root");
    for name in ["bin", "etc", "tmp", "srv"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nbuild:x:1000:1000::/srv:/bin/sh\n")
        .unwrap();
    fs::write(root.join("srv/page"), "served\n").unwrap();
    let save = folder.join("save");
    fs::create_dir(&save).unwrap();
    tar(&root, &save.join("layer.tar"));
    let output = Command::new("sha256sum").arg(save.join("layer.tar")).output().unwrap();
    let digest = String::from_utf8(output.stdout).unwrap()[..64].to_owned();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = format!(
        r#"{{"architecture": "{architecture}", "os": "linux",
            "config": {{"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "User": "build",
                        "Entrypoint": ["sh", "-c"], "Cmd": ["echo of the image itself; exec sleep 600"]}},
            "rootfs": {{"type": "layers", "diff_ids": ["sha256:{digest}"]}}}}"#
    );
    fs::write(save.join("config.json"), config).unwrap();
    let manifest = r#"[{"Config": "config.json", "RepoTags": ["busybox:1"], "Layers": ["layer.tar"]}]"#;
    fs::write(save.join("manifest.json"), manifest).unwrap();
    tar(&save, &folder.join("busybox.tar"));
}

fn tar(folder: &Path, into: &Path) {
    let excluded = format!("--exclude=./{}", into.file_name().unwrap().display());
    let packed =
        Command::new("tar").arg(excluded).arg("-C").arg(folder).arg("-cf").arg(into).arg(".").status();
    assert!(packed.unwrap().success());
}

#[test]
fn an_action_runs_in_an_image() {
    let Some(installation) = start("an_action_runs_in_an_image") else { return };
    let manifest = r#"name: image
actions:
  own:
    configuration: {container: "docker-archive:busybox.tar", network: off}
    commands: ["echo $(id -u) $HOME $FROM_IMAGE", "cat srv/page 2>/dev/null || cat /srv/page", "ls /usr 2>&1 || touch x"]
  root:
    configuration: {container: {image: "docker-archive:busybox.tar", user: root, entrypoint: [env, PUT=in]}, network: off}
    commands: ["echo $(id -u) $HOME $PUT"]
  missing:
    needs: []
    configuration: {container: "docker-archive:nothing.tar", network: off}
    commands: [echo never]
  shell:
    needs: []
    shell: bash
    configuration: {container: "docker-archive:busybox.tar", network: off}
    commands: [echo never]
"#;
    let number = installation.submit_manifest("repository", manifest);
    let pipeline = installation.finished(&number);
    let text = installation.text(&number, "own");
    let own: Vec<_> = text.lines().filter(|line| !line.starts_with("sealci: ")).collect();
    assert_eq!(own, ["1000 /srv yes", "served", "ls: /usr: No such file or directory"], "{pipeline}");
    assert!(text.starts_with("sealci: "), "it says what it does with the image first: {text}");
    assert!(installation.text(&number, "root").ends_with("0 /root in\n"));
    let missing = action(&pipeline, "missing")["outcome"].to_string();
    assert!(missing.contains("image") && missing.contains("nothing.tar"), "{missing}");
    assert_eq!(attempts(action(&pipeline, "missing")), ["errored"], "another attempt would find the same");
    let shell = action(&pipeline, "shell")["outcome"].to_string();
    assert!(shell.contains("has no `bash`"), "{shell}");
}

#[test]
fn services_run_beside_an_action_and_are_gone_with_it() {
    let Some(installation) = start("services_run_beside_an_action_and_are_gone_with_it") else { return };
    let manifest = r#"name: services
actions:
  used:
    configuration: {network: off}
    services:
      web:
        container: {image: "docker-archive:busybox.tar", user: root, entrypoint: []}
        command: [httpd, -f, -v, -p, "80", -h, /srv]
        env: {MARK: of-a-service}
        ready: {command: "wget -q -O /dev/null http://localhost/page", timeout: 30s}
      own: {container: "docker-archive:busybox.tar"}
      loud:
        container: {image: "docker-archive:busybox.tar", user: root}
        command: ["busybox yes loud | busybox head -c 41943040 && touch /tmp/said; exec sleep 600"]
        ready: {command: "test -e /tmp/said"}
    commands:
      - test ! -e /srv/page
      - |
        perl -MIO::Socket::INET -e 'my $s = IO::Socket::INET->new("web:80") or die "$!";
          print $s "GET /page HTTP/1.0\r\n\r\n"; print while <$s>'
  broken:
    needs: []
    configuration: {network: off}
    services:
      dies: {container: "docker-archive:busybox.tar", command: ["echo so it ends; exit 7"], ready: {command: "false"}}
    commands: [echo never]
  late:
    needs: []
    configuration: {network: off}
    services:
      slow: {container: "docker-archive:busybox.tar", ready: {command: "echo not yet; false", timeout: 1s}}
    commands: [echo never]
"#;
    let number = installation.submit_manifest("repository", manifest);
    let pipeline = installation.finished(&number);
    let text = installation.text(&number, "used");
    assert_eq!(action(&pipeline, "used")["outcome"]["kind"], "succeeded", "{text}{pipeline}");
    assert!(text.contains("sealci: service `web` is ready"), "{text}");
    assert!(text.contains("served\n"), "{text}");
    assert!(!text.contains("of the image itself"), "what services say is kept apart: {text}");
    let processes = host::processes_with("MARK=of-a-service");
    assert!(processes.is_empty(), "{processes:?}");

    let folder = installation.scratch("downloaded");
    let output = folder.display().to_string();
    let downloaded =
        installation.sealci(&["artifact", "download", &number, "--action", "used", "--output", &output]);
    assert_eq!(downloaded.status.code(), Some(0), "{}", both(&downloaded));
    let logs = Command::new("grep").args(["-rh", "of the image itself", &output]).output().unwrap();
    assert!(logs.status.success(), "{}", both(&installation.sealci(&["artifact", "list", &number])));
    let loud = Command::new("grep").args(["-rl", "the log is cut here", &output]).output().unwrap();
    let loud = String::from_utf8(loud.stdout).unwrap();
    let kept = fs::metadata(loud.trim_end()).expect("one log is cut, and says so").len();
    assert!((32 << 20..33 << 20).contains(&kept), "{kept} bytes are kept of 40 MiB");

    for (name, why) in [("broken", "`dies` ended (exit code 7)"), ("late", "`slow` was not ready after 1 s")]
    {
        let outcome = action(&pipeline, name)["outcome"].to_string();
        assert!(outcome.contains(why), "{outcome}");
        assert_eq!(attempts(action(&pipeline, name)), ["errored"], "it is not tried again");
    }
    assert!(installation.text(&number, "broken").contains("dies: so it ends"));
}

/// Mounts that any process sees of the agent's folder, processes, folders of attempts, and inits that were never whole.
fn left_of(installation: &Installation) -> Vec<String> {
    let work = installation.data().join("agent/work").display().to_string();
    let mut left = Vec::new();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let mounts = fs::read_to_string(process.path().join("mountinfo")).unwrap_or_default();
        left.extend(mounts.lines().filter(|mount| mount.contains(&work)).map(str::to_owned));
    }
    left.extend(host::processes_with("MARK=of-what-is-killed").iter().map(|pid| format!("process {pid}")));
    let attempts = fs::read_dir(&work).into_iter().flatten().flatten();
    let bin = fs::read_dir(installation.data().join("agent/bin")).into_iter().flatten().flatten();
    let partial = bin.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"."));
    left.extend(attempts.chain(partial).map(|entry| entry.path().display().to_string()));
    left
}

#[test]
fn an_agent_that_is_killed_at_any_moment_leaves_nothing() {
    const KILLS: u64 = 20;
    let Some(mut installation) = start("an_agent_that_is_killed_at_any_moment_leaves_nothing") else {
        return;
    };
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}");
    let mut random = seed;
    for round in 0..KILLS {
        let manifest = format!(
            r#"name: killed
actions:
  it:
    configuration: {{container: {{image: "docker-archive:busybox.tar", user: root}}, network: off}}
    env: {{MARK: of-what-is-killed}}
    services:
      own: {{container: "docker-archive:busybox.tar", env: {{MARK: of-what-is-killed}}, ready: {{command: "true"}}}}
    cache: [{{key: "round {round}", paths: [kept]}}]
    commands: ["mkdir -p kept; echo {round} >kept/x; (sleep 600 &) ; sleep 0.2; echo out"]
    artifacts: {{paths: [kept]}}
"#
        );
        let number = installation.submit_manifest(&format!("repository-{round}"), &manifest);
        // xorshift64.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        std::thread::sleep(Duration::from_millis(random % 900));
        installation.kill(Part::Agent);
        // As if it had been killed while it wrote its init.
        let partial = format!("agent/bin/.sealci-init-{}", installation.pid(Part::Agent));
        fs::write(installation.data().join(partial), "half").unwrap();
        installation.start_part(Part::Agent);
        let pipeline = installation.finished(&number);
        assert_eq!(
            pipeline["outcome"],
            "succeeded",
            "round {round} of seed {seed}: {}\n{}",
            action(&pipeline, "it")["outcome"],
            installation.text(&number, "it")
        );
        eventually(&format!("nothing to be left in round {round} of seed {seed}"), || {
            let left = left_of(&installation);
            if !left.is_empty() {
                eprintln!("still there: {left:?}");
            }
            left.is_empty().then_some(())
        });
    }
}

#[test]
fn what_is_cancelled_takes_its_services_along() {
    let Some(installation) = start("what_is_cancelled_takes_its_services_along") else { return };
    let manifest = r#"name: cancelled
actions:
  it:
    configuration: {container: "docker-archive:busybox.tar", network: off}
    services:
      own: {container: "docker-archive:busybox.tar", env: {MARK: of-what-is-killed}}
    commands: ["echo begun; sleep 600"]
  waiting:
    needs: []
    configuration: {container: "docker-archive:busybox.tar", network: off}
    services:
      slow: {container: "docker-archive:busybox.tar", ready: {command: "echo tried; false", timeout: 600s}}
    commands: [echo never]
"#;
    let repository = sealci_tests::Repository::with_manifest(installation.scratch("repository"), manifest);
    let mut following = installation.follow(&["submit", &repository.path.display().to_string(), "--follow"]);
    following.wait_for("begun");
    // Both are entered meanwhile: each has its own files and variables.
    let data = installation.data().display().to_string();
    let entered =
        |arguments: &[&str]| both(&installation.sealci(&[&["exec", "--data", &data], arguments].concat()));
    let said = entered(&["it", "--service", "own", "env"]);
    assert!(said.contains("MARK=of-what-is-killed") && said.contains("FROM_IMAGE=yes"), "{said}");
    let said = entered(&["it", "--", "sh", "-c", "id -u; echo mark=$MARK; ls -d .sealci"]);
    assert_eq!(said, "1000\nmark=\n.sealci\n");
    let said = entered(&["it", "--service", "other", "env"]);
    assert!(said.contains("`it` has no service `other`, but own"), "{said}");
    assert!(installation.sealci(&["cancel", "1"]).status.success());
    let pipeline = installation.finished("1");
    for name in ["it", "waiting"] {
        assert_eq!(action(&pipeline, name)["outcome"]["kind"], "cancelled", "{pipeline}");
    }
    eventually("nothing to be left", || {
        let left = left_of(&installation);
        if !left.is_empty() {
            eprintln!("still there: {left:?}");
        }
        left.is_empty().then_some(())
    });
}
