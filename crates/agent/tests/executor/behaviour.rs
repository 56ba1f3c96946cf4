//! What commands may expect of the shell they run in.

use std::time::Duration;

use sealci_agent::executor::{ExecutorError, ShellKind};
use sealci_core::outcome::{Cause, Limit, Outcome};
use sealci_core::plan::Resources;

use crate::lab::{Lab, Record, until_output};

fn failed(exit_code: i32) -> Outcome {
    Outcome::Failed { exit_code, limit: None }
}

pub async fn exit_codes_are_the_shells(lab: &Lab) {
    for (command, code) in [
        ("exit 7", 7),
        ("sh -c 'exit 3'", 3),
        ("kill -9 $$", 137),
        ("sh -c 'kill -9 $$'", 137),
        ("nosuch", 127),
    ] {
        let record = lab.run_commands(["true", command]).await;
        assert_eq!(record.outcome(), &failed(code), "{command}: {}", record.text());
        assert_eq!(record.exit_codes(), [Some(0), Some(code)], "{command}");
    }
    let record = lab.run_commands(["true", "echo done"]).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    assert_eq!(record.text(), "done\n");
    assert_eq!(record.exit_codes(), [Some(0), Some(0)]);
}

pub async fn one_shell_runs_all_commands(lab: &Lab) {
    let record = lab
        .run_commands([
            "mkdir sub && cd sub && touch here",
            "x=5; export y=6; f() { echo \"f $x $y $1\"; }; set -u",
            "f z; test -e here; echo \"${PWD##*/}\"",
            "exec 9>lock; exec 3</dev/null",
            "echo held >&9; cat lock",
            "umask 077; trap 'echo bye' EXIT",
            "umask",
        ])
        .await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(record.text(), "f 5 6 z\nsub\nheld\n0077\nbye\n");
    assert_eq!(record.output_of(2), "f 5 6 z\nsub\n");
    // What is set for the shell's exit belongs to the last command.
    assert_eq!(record.output_of(6), "0077\nbye\n");
}

pub async fn a_failure_stops_what_follows(lab: &Lab) {
    let record = lab.run_commands(["echo a; false; echo b", "echo c"]).await;
    assert_eq!(record.outcome(), &failed(1));
    assert_eq!(record.text(), "a\n");
    assert_eq!(record.exit_codes(), [Some(1)]);

    let record = lab.run_commands(["set +e", "false", "echo status $?", "exit 4"]).await;
    assert_eq!(record.outcome(), &failed(4));
    assert_eq!(record.text(), "status 1\n");
    assert_eq!(record.exit_codes(), [Some(0), Some(1), Some(0), Some(4)]);

    let record = lab.run_commands(["echo a; exit 0", "echo never"]).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    assert_eq!(record.text(), "a\n");
}

pub async fn a_broken_command_breaks_alone(lab: &Lab) {
    for broken in ["echo 'open", "echo \"open", "if true", "f() {", "echo $((", "(", ")", "done", "case x in"]
    {
        let record = lab.run_commands(["echo first", broken, "echo ' third\" )'; fi; } ))"]).await;
        let exit_code = record.commands[1].exit_code.expect("the broken one ends");
        assert_eq!(record.output_of(0), "first\n", "{broken}");
        assert_ne!(exit_code, 0, "{broken}");
        assert_eq!(record.outcome(), &failed(exit_code), "{broken}");
        assert_eq!(record.commands.len(), 2, "{broken}: {}", record.text());
        assert!(record.text().contains("command-2"), "{broken}: {}", record.text());
    }
}

pub async fn odd_commands_do_what_a_script_does(lab: &Lab) {
    let record = lab
        .run_commands([
            "",
            "# only a comment",
            "  \n\n",
            "echo ends in a backslash \\",
            "cat <<EOF\nfrom a heredoc\nEOF",
            "cat <<EOF\nunfinished",
            "cat; echo stdin is empty",
            "break; continue; echo after break",
            "return 0; echo never",
            "false || true",
            "echo one; # and a comment",
            "set -f; echo *",
            "IFS=0123456789; a=x1y; echo $a",
            "printf() { :; }; read() { :; }; echo ok",
            "echo last",
        ])
        .await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(record.commands.len(), 15);
    assert_eq!(record.output_of(4), "from a heredoc\n");
    assert_eq!(record.output_of(5), "unfinished");
    assert_eq!(record.output_of(6), "stdin is empty\n");
    assert_eq!(record.output_of(7), "after break\n");
    assert_eq!(record.output_of(8), "");
    assert_eq!(record.output_of(11), "*\n");
    assert_eq!(record.output_of(12), "x y\n");
    assert_eq!(record.output_of(14), "last\n");

    let record = lab.run_commands(["echo a", "exec sh -c 'echo b; exit 5'", "echo c"]).await;
    assert_eq!(record.outcome(), &failed(5));
    assert_eq!(record.output_of(1), "b\n");

    let record = lab.run_commands(["trap 'exit 7' EXIT", "true"]).await;
    assert_eq!(record.outcome(), &failed(7));
    assert_eq!(record.exit_codes(), [Some(0), Some(7)]);
}

pub async fn bash_runs_when_asked(lab: &Lab) {
    let mut request =
        lab.request(["a=(1 2 3)", "echo ${#a[@]} ${BASH_VERSION:+bash}", "echo 'open", "echo never"]);
    request.shell = ShellKind::Bash;
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &failed(2), "{}", record.text());
    assert_eq!(record.output_of(1), "3 bash\n");
    assert_eq!(record.commands.len(), 3);
}

pub async fn a_missing_shell_is_our_error(lab: &Lab) {
    let mut request = lab.request(["true"]);
    request.shell = ShellKind::Bash;
    request.env.insert("PATH".into(), "/nowhere".into());
    let record = lab.run(request).await;
    match record.outcome() {
        Outcome::Errored { cause: Cause::Executor, message } => {
            assert!(message.contains("bash") && message.contains("No such file"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert!(record.commands.is_empty());
}

pub async fn output_belongs_to_its_command(lab: &Lab) {
    let commands: Vec<String> = (0..40)
        .map(|index| format!("head -c {} /dev/zero | tr '\\0' {}", index * 3000, index % 10))
        .collect();
    let record = lab.run_commands(commands).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    for index in 0..40 {
        let expected = (index % 10).to_string().repeat(index * 3000);
        assert!(record.output_of(index) == expected, "command {index}");
    }
}

pub async fn both_outputs_keep_their_order(lab: &Lab) {
    let record = lab.run_commands(["for i in 1 2 3; do echo out $i; echo err $i >&2; done"]).await;
    assert_eq!(record.text(), "out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n");
}

pub async fn the_environment_is_the_actions_alone(lab: &Lab) {
    let mut request = lab.request([
        "env -0 | cut -z -d= -f1 | sort -z | tr '\\0' ' '",
        "echo \"$GREETING\"",
        "pwd; ls -d \"$HOME\" \"$TMPDIR\" >/dev/null",
    ]);
    request.env.insert("GREETING".into(), "tab\t\"quotes\" and\nlines".into());
    request.env.insert("PATH".into(), "/usr/bin:/bin".into());
    let attempt = request.attempt;
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{attempt}: {}", record.text());
    assert_eq!(record.output_of(0), "GREETING HOME PATH PWD SEALCI_ATTEMPT SEALCI_WORKSPACE TMPDIR ");
    assert_eq!(record.output_of(1), "tab\t\"quotes\" and\nlines\n");
}

pub async fn no_descriptor_leaks(lab: &Lab) {
    let record = lab.run_commands(["ls /proc/self/fd | tr '\\n' ' '", "readlink /proc/self/fd/0"]).await;
    // The fourth is the folder that `ls` itself reads.
    assert_eq!(record.text(), "0 1 2 3 /dev/null\n");
}

pub async fn meddling_hurts_only_the_meddler(lab: &Lab) {
    // `$__dir` is where the driver's files are.
    let find = "__dir=$(dirname \"$(tr '\\0' ' ' </proc/$$/cmdline | sed \"s/.*\\. '\\(.*\\)' .*/\\1/\")\"); test -p $__dir/ask";
    for meddling in [
        "echo garbage >$__dir/ask; echo 7 >$__dir/ask; echo 8 >$__dir/ask",
        "head -c 100000 /dev/zero | tr '\\0' x >$__dir/ask",
        "rm -rf $__dir",
        "rm $__dir/ask; mkdir $__dir/command-4 2>/dev/null || true",
        "unset -f __sealci",
        "(cat $__dir/answer & cat $__dir/ask &) >/dev/null 2>&1",
        "ln -s /etc/passwd $__dir/command-4",
    ] {
        let mut request = lab.request([find, meddling, "echo third", "echo fourth"]);
        request.timeout = Duration::from_secs(3);
        request.grace = Duration::from_millis(100);
        // However it ends: it ends, and says so.
        let record = lab.run(request).await;
        assert!(record.commands[0].exit_code == Some(0), "{meddling}: {}", record.text());
    }
    assert_eq!(lab.run_commands(["echo fine"]).await.text(), "fine\n");
}

pub async fn resource_use_is_told(lab: &Lab) {
    let spin = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
    let record = lab.run_commands([spin]).await;
    let command = &record.commands[0];
    assert!(command.cpu > Duration::from_millis(50), "{command:?}");
    assert!(command.duration >= command.cpu / 2, "{command:?}");
    assert!(command.memory_peak_bytes > 500 << 10, "{command:?}");

    let record = lab.run_commands(["true", spin, "sleep 0.2"]).await;
    let [first, second, third] = &record.commands[..] else { panic!("{record:?}") };
    assert!(first.cpu < Duration::from_millis(50) && third.cpu < Duration::from_millis(50), "{record:?}");
    assert!(second.cpu > Duration::from_millis(50), "{record:?}");
    assert!(third.duration >= Duration::from_millis(200), "{record:?}");
}

pub async fn limits_are_named(lab: &Lab) {
    if !lab.limits {
        return;
    }
    let mut request = lab.request(["echo start", "tail /dev/zero", "echo never"]);
    request.resources = Resources { cpu_millis: 1000, memory_bytes: 64 << 20 };
    let record = lab.run(request).await;
    match record.outcome() {
        Outcome::Failed { limit: Some(Limit::Memory), .. } => {}
        other => panic!("{other:?}: {}", record.text()),
    }
    assert!(record.text().starts_with("start\n"));
}

pub async fn an_attempt_runs_once(lab: &Lab) {
    let request = lab.request(["echo up; sleep 1000"]);
    let again = request.clone();
    let mut execution = lab.start(request).await;
    until_output(&mut execution, "up").await;
    match lab.executor.prepare(again).await {
        Err(ExecutorError::AlreadyRunning(_)) => {}
        other => panic!("{other:?}"),
    }
    execution.handle().kill();
    while execution.next().await.is_some() {}
}

pub async fn a_standby_sees_what_came_after_it(lab: &Lab) {
    let request = lab.request(["cat late && echo mine >late && cat late"]);
    let workspace = request.workspace.clone();
    let standby = lab.executor.prepare(request).await.unwrap();
    // Beside it, and by a rename, as git does.
    std::fs::write(workspace.join("partial"), "filled later\n").unwrap();
    std::fs::rename(workspace.join("partial"), workspace.join("late")).unwrap();
    let record = Record::of(&mut standby.begin()).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(record.text(), "filled later\nmine\n");
}

pub async fn an_abandoned_standby_leaves_nothing(lab: &Lab) {
    let request = lab.request(["touch ran"]);
    let standby = lab.executor.prepare(request.clone()).await.unwrap();
    assert_eq!(standby.abandon().await, (Outcome::Cancelled, None));
    for folder in &lab.cgroup_folders {
        assert!(!folder.join(request.attempt.to_string()).exists());
    }
    // `close` waits for what was dropped without a word.
    let dropped = lab.request(["touch ran"]);
    drop(lab.executor.prepare(dropped.clone()).await.unwrap());
    lab.executor.close().await;
    for folder in &lab.cgroup_folders {
        assert!(!folder.join(dropped.attempt.to_string()).exists());
    }
    assert!(!request.workspace.join("ran").exists() && !dropped.workspace.join("ran").exists());
}
