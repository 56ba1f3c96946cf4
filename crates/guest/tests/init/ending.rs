//! How an init ends while files are on their way.

use std::io::Write;
use std::time::{Duration, Instant};

use sealci_guest::wire::{
    Ending, Lease, MAX_PUT_DATA_BYTES, PUT_DATA_KIND, PUT_WINDOW_BYTES, Start, ToInit, Wake,
};

use crate::host::{Host, PATIENCE, Said, names_in};

/// So much is never in any buffer.
const MUCH: &str = "head -c 100000000 /dev/zero >big; echo small >small";

#[test]
fn nothing_is_waited_for_unless_it_is_to_stay() {
    let mut host = Host::new();
    let start = host.start_of(&["true"]);
    host.start(start);
    assert_eq!(host.finish().1, Ending::Succeeded);
}

#[test]
fn an_init_that_stays_leaves_when_told_and_says_the_same() {
    let mut host = Host::new();
    let start = Start { stays: true, ..host.start_of(&["exit 9"]) };
    host.start(start);
    let ended = host.output_until(|said| matches!(said, Said::Ended(_))).1;
    assert_eq!(ended, Said::Ended(Ending::Failed { exit_code: 9 }));
    host.send(&ToInit::Leave);
    assert_eq!(host.finish().1, Ending::Failed { exit_code: 9 });
}

#[test]
fn what_is_cancelled_does_not_stay() {
    let mut host = Host::new();
    let start = Start { stays: true, ..host.start_of(&["echo up; exec sleep 1000"]) };
    host.start(start);
    host.until_output("up");
    host.send(&ToInit::Cancel { grace_ms: 60_000 });
    assert_eq!(host.finish().1, Ending::Cancelled);
}

#[test]
fn nothing_lives_when_files_are_taken() {
    let mut host = Host::new();
    host.run_and_stay(&["(trap '' TERM HUP; setsid sleep 4711 & sleep 4711) >/dev/null 2>&1 & echo $$ >pid"]);
    let group = std::process::Command::new("pgrep").args(["-f", "sleep 4711"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&group.stdout), "");
    host.send(&ToInit::Leave);
    host.finish();
}

#[test]
fn a_kill_is_heard_while_nobody_reads_the_archive() {
    for message in [ToInit::Kill, ToInit::Cancel { grace_ms: 60_000 }, ToInit::Leave] {
        let mut host = Host::new();
        host.run_and_stay(&[MUCH]);
        host.ask_take(1, &["."], "");
        // It has begun, and has no room to go on.
        assert!(matches!(host.hear(), Said::Data(_)));
        let asked_at = Instant::now();
        host.send(&message);
        assert_eq!(host.finish().1, Ending::Succeeded, "{message:?}");
        assert!(asked_at.elapsed() < PATIENCE / 3);
    }
}

#[test]
fn a_stopped_take_makes_room_for_the_next() {
    let mut host = Host::new();
    host.run_and_stay(&[MUCH]);
    host.ask_take(1, &["big"], "");
    assert!(matches!(host.hear(), Said::Data(_)));
    host.ask_take(2, &["small"], "");
    host.send(&ToInit::Stop { id: 1 });
    let mut refused = Vec::new();
    while refused.len() < 2 {
        match host.hear() {
            Said::Data(_) => {}
            Said::Refused { id, why } => refused.push((id, why)),
            other => panic!("{other:?}"),
        }
    }
    refused.sort();
    assert!(refused[0].0 == 1 && refused[1].1.contains("on their way"), "{refused:?}");
    let (archive, said) = host.take(3, &["small"], "");
    assert!(matches!(said, Said::Taken(_)));
    assert_eq!(names_in(&archive), [("small".to_owned(), "small\n".to_owned())]);
}

#[test]
fn a_host_that_goes_ends_it_in_mid_take() {
    let mut host = Host::new();
    host.run_and_stay(&[MUCH]);
    host.ask_take(1, &["."], "");
    assert!(matches!(host.hear(), Said::Data(_)));
    host.stream.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(!host.child.wait().unwrap().success());
}

#[test]
fn a_kill_is_heard_among_files_that_come_in() {
    let mut host = Host::new();
    host.begin_put(1, "");
    let mut header = tar::Header::new_ustar();
    header.set_size(1 << 30);
    header.set_mode(0o644);
    header.set_path("big").unwrap();
    header.set_cksum();
    host.send_piece(header.as_bytes());
    host.send_piece(&[1; MAX_PUT_DATA_BYTES]);
    host.send(&ToInit::Kill);
    let (_, ending) = host.finish();
    assert_eq!(ending, Ending::Cancelled);
}

#[test]
fn a_host_that_sends_more_than_there_is_room_for_is_left() {
    let mut host = Host::new();
    host.begin_put(1, "");
    let too_much = u32::try_from(PUT_WINDOW_BYTES + 1).unwrap();
    host.stream.write_all(&too_much.to_le_bytes()).unwrap();
    host.stream.write_all(&[PUT_DATA_KIND]).unwrap();
    // It may be gone before it has read everything.
    let _ = host.stream.write_all(&vec![0; PUT_WINDOW_BYTES + 1]);
    assert!(!host.child.wait().unwrap().success());
}

#[test]
fn commands_do_not_start_among_files() {
    let mut host = Host::new();
    host.begin_put(1, "");
    let start = host.start_of(&["true"]);
    host.send(&ToInit::Start(start));
    assert_eq!(host.try_hear(), None);
    assert!(!host.child.wait().unwrap().success());
}

/// As dash does around every fork: TERM waits meanwhile. Here it forks once it was stopped and let go again.
const FORKS_WITH_TERM_BLOCKED: &str = r#"exec perl -e '
use POSIX qw(:signal_h);
my $term = POSIX::SigSet->new(SIGTERM);
sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGTERM, SIGCONT));
$SIG{CONT} = sub {};
$| = 1;
print "up\n";
sigsuspend($term);
my $child = fork();
sigprocmask(SIG_SETMASK, POSIX::SigSet->new());
exec "sleep", "1000" unless $child;
wait;
'"#;

#[test]
fn a_child_is_asked_too_that_is_forked_while_term_is_blocked() {
    let mut host = Host::new();
    let start = host.start_of(&[FORKS_WITH_TERM_BLOCKED]);
    host.start(start);
    host.until_output("up");
    host.send(&ToInit::Cancel { grace_ms: 10 * PATIENCE.as_millis() as u64 });
    assert_eq!(host.finish().1, Ending::Cancelled);
}

/// A lease that ends so long from now.
fn lease(left: Duration) -> ToInit {
    let boot_time = || {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap(); // of the boot-time clock
        Duration::from_secs_f64(uptime.split(' ').next().unwrap().parse().unwrap())
    };
    let until_boot_ms = (boot_time() + left).as_millis() as u64;
    ToInit::Lease(Lease { until_boot_ms, longest_ms: 10_000 })
}

#[test]
fn the_end_of_a_lease_kills_without_grace_though_the_host_is_stopped() {
    let mut host = Host::new();
    let oracle = host.work().join("oracle");
    host.send(&lease(Duration::from_secs(2)));
    let began = Instant::now();
    let start = host.start_of(&["trap '' TERM; while :; do date +%s.%N >>oracle; sleep 0.05; done"]);
    host.start(start);
    // Nothing is said to it, and nothing is read of it.
    while began.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let written = std::fs::metadata(&oracle).unwrap().len();
    assert!(written > 0);
    assert_eq!(host.finish().1, Ending::Expired);
    assert_eq!(std::fs::metadata(&oracle).unwrap().len(), written, "it was dead by then");
}

#[test]
fn a_renewed_lease_lets_it_go_on_and_an_older_one_is_not_later() {
    let mut host = Host::new();
    host.send(&lease(Duration::from_secs(1)));
    let start = host.start_of(&["sleep 2.5; echo over"]);
    host.start(start);
    host.send(&lease(Duration::from_secs(8)));
    let (text, ending) = host.finish();
    assert_eq!((text.as_str(), ending), ("over\n", Ending::Succeeded));
}

#[test]
fn a_lease_that_is_past_kills_at_once() {
    let mut host = Host::new();
    let start = host.start_of(&["echo up; exec sleep 1000"]);
    host.start(start);
    host.until_output("up");
    host.send(&ToInit::Lease(Lease { until_boot_ms: 1, longest_ms: 10_000 }));
    assert_eq!(host.finish().1, Ending::Expired);
}

#[test]
fn a_lease_by_another_clock_is_refused() {
    let mut host = Host::new();
    host.send(&lease(Duration::from_secs(3600)));
    let Ending::Error(why) = host.finish().1 else { panic!("it was taken") };
    assert!(why.contains("clock"), "{why}");
}

#[test]
fn only_the_init_of_a_machine_is_woken() {
    let mut host = Host::new();
    host.send(&ToInit::Wake(Wake { unix_time_us: 1, ..Wake::default() }));
    // The clock is the host's own.
    assert_eq!(host.try_hear(), None);
    assert!(!host.child.wait().unwrap().success());
}
