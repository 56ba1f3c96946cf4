//! What runs, in the place of commands and beside them.

use std::time::{Duration, Instant};

use sealci_guest::wire::{Ending, Exec, ExecEnd, Start, ToInit};

use crate::host::{Host, PATIENCE, Said};

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn a_home_is_found_where_none_is_given() {
    let mut host = Host::new();
    let start = host.start_of(&["echo \"home=$HOME\"; echo ~"]);
    host.start(start);
    let (text, ending) = host.finish();
    assert_eq!(ending, Ending::Succeeded);
    let expected =
        std::process::Command::new("sh").args(["-c", "getent passwd $(id -u) | cut -d: -f6"]).output();
    let home = String::from_utf8(expected.unwrap().stdout).unwrap();
    assert_eq!(text, format!("home={}\n{}\n", home.trim(), home.trim()));
}

#[test]
fn a_wrapper_stands_in_front_of_the_shell() {
    let mut host = Host::new();
    let start = Start {
        wrapper: words(&["sh", "-c", "echo entry; WRAPPED=yes exec \"$@\"", "entrypoint"]),
        ..host.start_of(&["echo \"wrapped=$WRAPPED\"", "false"])
    };
    host.start(start);
    let (text, ending) = host.finish();
    assert_eq!(text, "entry\nwrapped=yes\n");
    assert_eq!(ending, Ending::Failed { exit_code: 1 });
}

#[test]
fn what_cannot_be_started_is_named() {
    for (change, part) in [
        (
            (|start: &mut Start| start.shell = "nosuchshell".to_owned()) as fn(&mut Start),
            "has no `nosuchshell`",
        ),
        (|start| start.wrapper = words(&["/entry.sh"]), "has no `/entry.sh`"),
        (|start| start.program = words(&["nosuch", "x"]), "has no `nosuch`"),
        (|start| start.workdir = b"/nosuchfolder".to_vec(), "no folder /nosuchfolder"),
        (|start| start.shell = "/etc/passwd".to_owned(), "Permission denied"),
    ] {
        let mut host = Host::new();
        let mut start = host.start_of(&["true"]);
        change(&mut start);
        host.start(start);
        let (_, ending) = host.finish();
        assert!(matches!(&ending, Ending::Error(text) if text.contains(part)), "{part}: {ending:?}");
    }
}

#[test]
fn one_program_runs_in_the_place_of_commands() {
    let mut host = Host::new();
    let start =
        Start { program: words(&["sh", "-c", "echo \"$0 $1\"; exit 3", "a", "b c"]), ..host.start_of(&[]) };
    host.start(start);
    assert_eq!(host.hear(), Said::Started(0));
    let (text, done) = host.output_until(|said| matches!(said, Said::Done { .. }));
    assert_eq!((&*text, done), ("a b c\n", Said::Done { index: 0, exit_code: 3 }));
    assert_eq!(host.finish().1, Ending::Failed { exit_code: 3 });
}

#[test]
fn a_program_hears_its_own_signal() {
    let mut host = Host::new();
    let script = "trap 'echo told; exit 0' USR1; trap 'echo wrong; exit 1' TERM; \
                  (trap '' TERM; sleep 1000) & echo up; while :; do sleep 0.05; done";
    let program = words(&["sh", "-c", script]);
    let stop_signal = u8::try_from(libc::SIGUSR1).unwrap();
    let start = Start { program, stop_signal, ..host.start_of(&[]) };
    host.start(start);
    host.until_output("up");
    let asked_at = Instant::now();
    host.send(&ToInit::Cancel { grace_ms: 60_000 });
    let (text, ending) = host.finish();
    // Its end ends what it left, without the grace.
    assert!(asked_at.elapsed() < PATIENCE / 3);
    assert_eq!((&*text, ending), ("told\n", Ending::Cancelled));
}

#[test]
fn a_programs_timeout_counts() {
    let mut host = Host::new();
    let program = words(&["sh", "-c", "trap '' TERM; while :; do sleep 0.05; done"]);
    let start = Start { program, timeout_ms: Some(200), grace_ms: 100, ..host.start_of(&[]) };
    host.start(start);
    assert_eq!(host.finish().1, Ending::TimedOut);
}

fn exec(host: &mut Host, id: u32, line: &str, timeout: Duration) {
    let env = vec![("EXTRA".to_owned(), "more".to_owned())];
    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap();
    host.send(&ToInit::Exec(Exec {
        id,
        program: words(&["sh", "-c", line]),
        env,
        timeout_ms,
        streams: false,
    }));
}

fn exec_end(host: &mut Host) -> (u32, ExecEnd, String) {
    match host.output_until(|said| matches!(said, Said::Exec { .. })).1 {
        Said::Exec { id, end, output } => (id, end, String::from_utf8(output).unwrap()),
        _ => unreachable!(),
    }
}

#[test]
fn programs_run_beside_the_commands() {
    let mut host = Host::new();
    exec(&mut host, 1, "true", PATIENCE);
    assert!(matches!(exec_end(&mut host), (1, ExecEnd::Refused { .. }, _)));
    let env = vec![("GREETING".to_owned(), "hello".to_owned())];
    let start = Start { env, ..host.start_of(&["echo up; until test -e go; do sleep 0.01; done; echo on"]) };
    host.start(start);
    host.until_output("up");
    exec(&mut host, 2, "echo $GREETING $EXTRA; pwd >&2; exit 4", PATIENCE);
    let expected = format!("hello more\n{}\n", host.work().display());
    assert_eq!(exec_end(&mut host), (2, ExecEnd::Exited { exit_code: 4 }, expected));
    // Only the last of what it says.
    exec(&mut host, 3, "head -c 1000000 /dev/zero | tr '\\0' x; echo end", PATIENCE);
    let (_, end, output) = exec_end(&mut host);
    assert_eq!(end, ExecEnd::Exited { exit_code: 0 });
    assert_eq!(output, "x".repeat(4092) + "end\n");
    // Its own time, with what it started.
    exec(&mut host, 4, "echo waits; sleep 1000 & wait", Duration::from_millis(200));
    assert_eq!(exec_end(&mut host), (4, ExecEnd::TimedOut, "waits\n".to_owned()));
    exec(&mut host, 5, "nosuch", PATIENCE);
    assert_eq!(exec_end(&mut host).1, ExecEnd::Exited { exit_code: 127 });
    host.send(&ToInit::Exec(Exec { id: 6, program: words(&["nosuch"]), ..Exec::default() }));
    assert!(
        matches!(exec_end(&mut host), (6, ExecEnd::Refused { why }, _) if why.contains("has no `nosuch`"))
    );
    exec(&mut host, 7, "echo stays; exec sleep 1000", PATIENCE);
    host.send(&ToInit::Stop { id: 7 });
    assert!(matches!(exec_end(&mut host), (7, ExecEnd::Stopped, _)));
    // Many at once, and one that goes with the commands.
    for id in 100..120 {
        exec(&mut host, id, "sleep 0.1", PATIENCE);
    }
    let ends: Vec<_> = (100..120).map(|_| exec_end(&mut host).1).collect();
    assert!(ends.contains(&ExecEnd::Exited { exit_code: 0 }));
    assert!(ends.iter().any(|end| matches!(end, ExecEnd::Refused { why } if why.contains("wait for one"))));
    exec(&mut host, 8, "touch go; exec sleep 1000", PATIENCE);
    assert!(matches!(exec_end(&mut host), (8, ExecEnd::Stopped, _)));
    assert_eq!(host.finish().1, Ending::Succeeded);
}

#[test]
fn what_runs_beside_may_close_its_outputs() {
    let mut host = Host::new();
    let start = host.start_of(&["echo up; until test -e go; do sleep 0.01; done; sleep 0.3"]);
    host.start(start);
    host.until_output("up");
    exec(&mut host, 1, "exec >&- 2>&-; touch go; sleep 1000", PATIENCE);
    assert_eq!(host.output_until(|said| matches!(said, Said::Exec { .. })).0, "");
    // Had it polled a closed pipe all the while, this would be most of the time.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", host.child.id())).unwrap();
    let ticks: u64 =
        stat.rsplit(')').next().unwrap().split(' ').skip(12).take(2).map(|n| n.parse::<u64>().unwrap()).sum();
    assert!(ticks < 15, "{ticks}");
    assert_eq!(host.finish().1, Ending::Succeeded);
}

/// A line that streams.
fn stream(host: &mut Host, id: u32, line: &str) {
    let program = words(&["sh", "-c", line]);
    let timeout_ms = u64::try_from(PATIENCE.as_millis()).unwrap();
    host.send(&ToInit::Exec(Exec { id, program, timeout_ms, streams: true, ..Exec::default() }));
}

/// What one program says on both outputs until its end, which the host takes.
fn all_of_it(host: &mut Host, id: u32) -> ([String; 2], ExecEnd) {
    let mut texts = [String::new(), String::new()];
    loop {
        match host.output_until(|said| matches!(said, Said::Piece { .. } | Said::Exec { .. })).1 {
            Said::Piece { is_error, bytes } => {
                texts[usize::from(is_error)].push_str(std::str::from_utf8(&bytes).unwrap());
                host.send(&ToInit::ExecTaken { id });
            }
            Said::Exec { end, output, .. } => {
                assert!(output.is_empty());
                return (texts, end);
            }
            _ => unreachable!(),
        }
    }
}

#[test]
fn what_runs_beside_may_be_talked_with() {
    let mut host = Host::new();
    let start = host.start_of(&["echo up; until test -e go; do sleep 0.01; done"]);
    host.start(start);
    host.until_output("up");
    stream(&mut host, 1, "cat; echo done >&2; exit 3");
    for piece in ["one ", "two", ""] {
        host.send(&ToInit::ExecInput { id: 1, bytes: piece.as_bytes().to_vec() });
    }
    let (texts, end) = all_of_it(&mut host, 1);
    assert_eq!((texts, end), (["one two".to_owned(), "done\n".to_owned()], ExecEnd::Exited { exit_code: 3 }));
    // What comes for one that is gone is nobody's.
    host.send(&ToInit::ExecInput { id: 1, bytes: vec![1] });
    host.send(&ToInit::ExecTaken { id: 1 });

    // All of it is passed on, also what it wrote before its end; what it leaves behind is not waited for.
    stream(&mut host, 2, "(sleep 1000 &); head -c 1000000 /dev/zero | tr '\\0' x");
    let (texts, end) = all_of_it(&mut host, 2);
    assert_eq!((texts[0].len(), end), (1_000_000, ExecEnd::Exited { exit_code: 0 }));

    // A host that takes nothing holds up that program alone; and it can be stopped.
    stream(&mut host, 3, "exec yes");
    for _ in 0..8 {
        host.output_until(|said| matches!(said, Said::Piece { .. }));
    }
    stream(&mut host, 4, "echo beside");
    let piece = host.output_until(|said| matches!(said, Said::Piece { .. })).1;
    assert_eq!(piece, Said::Piece { is_error: false, bytes: b"beside\n".to_vec() });
    assert!(matches!(exec_end(&mut host), (4, ExecEnd::Exited { exit_code: 0 }, _)));
    host.send(&ToInit::Stop { id: 3 });
    assert!(matches!(exec_end(&mut host), (3, ExecEnd::Stopped, _)));

    // A program that reads nothing takes no more than its pipe holds; one that ends takes the rest with it.
    stream(&mut host, 5, "sleep 1000");
    for _ in 0..8 {
        host.send(&ToInit::ExecInput { id: 5, bytes: vec![0; 16 << 10] });
    }
    for _ in 0..4 {
        host.output_until(|said| *said == Said::Passed(5));
    }
    stream(&mut host, 6, "touch go; exec sleep 1000");
    let ends = [exec_end(&mut host), exec_end(&mut host)];
    assert!(ends.iter().all(|(_, end, _)| *end == ExecEnd::Stopped), "{ends:?}");
    assert_eq!(host.finish().1, Ending::Succeeded);
}

#[test]
fn more_input_than_there_is_room_for_ends_the_conversation() {
    let mut host = Host::new();
    let start = host.start_of(&["echo up; sleep 1000"]);
    host.start(start);
    host.until_output("up");
    stream(&mut host, 1, "sleep 1000");
    // A pipe's worth, a window's, and one.
    for _ in 0..4 + 8 + 1 {
        host.send(&ToInit::ExecInput { id: 1, bytes: vec![0; 16 << 10] });
    }
    while host.try_hear().is_some() {}
    assert!(!host.child.wait().unwrap().success());
}
