//! Which files an init packs, and how.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;

use sealci_guest::wire::{Take, Taken, ToInit};

use crate::host::{Host, Said, names_in, only_names};

fn taken(said: Said) -> Taken {
    match said {
        Said::Taken(taken) => taken,
        other => panic!("{other:?}"),
    }
}

fn refusal(said: Said) -> String {
    match said {
        Said::Refused { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn patterns_choose() {
    let mut host = Host::new();
    host.run_and_stay(&[
        "mkdir -p target/sub/deep empty; for f in target/a.xml target/b.xml target/c.o target/sub/d.xml target/sub/deep/e.o; \
         do echo $f >$f; done; echo t >top.xml; mkdir -p $HOME",
    ]);
    for (paths, names) in [
        (&["target/*.xml"][..], &["target/a.xml", "target/b.xml"][..]),
        (&["**/*.xml"], &["target/a.xml", "target/b.xml", "target/sub/d.xml", "top.xml"]),
        (&["target/sub"], &["target/sub/", "target/sub/d.xml", "target/sub/deep/", "target/sub/deep/e.o"]),
        (
            &["target", "!**/*.o", "!target/sub/deep"],
            &["target/", "target/a.xml", "target/b.xml", "target/sub/", "target/sub/d.xml"],
        ),
        (
            &["target/a.xml", "target", "!target/sub", "target/*.o"],
            &["target/", "target/a.xml", "target/b.xml", "target/c.o"],
        ),
        (&["{top,target/a}.xml", "empty"], &["empty/", "target/a.xml", "top.xml"]),
        (&["target/?.o", "./empty/"], &["empty/", "target/c.o"]),
        (&["nothing"], &[]),
        (&[], &[]),
    ] {
        let (archive, said) = host.take(1, paths, "");
        let taken = taken(said);
        assert_eq!(only_names(&archive), names, "{paths:?}");
        assert_eq!(taken.files as usize, names.len(), "{paths:?}");
        assert_eq!(taken.missing, if paths == ["nothing"] { vec![0] } else { vec![] }, "{paths:?}");
    }
    // Relative to another folder, and in one.
    let (archive, _) = host.take(2, &["target/sub/d.xml"], "target");
    assert_eq!(names_in(&archive), [("sub/d.xml".to_owned(), "target/sub/d.xml\n".to_owned())]);
    let work = host.work();
    let (archive, _) = host.take(3, &[work.join("target/*.o").to_str().unwrap()], "");
    assert_eq!(only_names(&archive), ["target/c.o"]);
    let (archive, _) = host.take(4, &["."], "target/sub");
    assert_eq!(archive.len(), 0);
    let (archive, _) = host.take(5, &["target/sub/**"], "target/sub");
    assert_eq!(only_names(&archive), ["d.xml", "deep/", "deep/e.o"]);
    for (paths, base, part) in [
        (&["top.xml"][..], "target", "not in"),
        (&["/etc/passwd"], "", "not in"),
        (&["../x"], "", "`..`"),
        (&["a["], "", "no pattern"),
    ] {
        let why = refusal(host.take(6, paths, base).1);
        assert!(why.contains(part), "{paths:?}: {why}");
    }
    let (archive, _) = host.take(7, &["/etc/passwd", "top.xml"], "/");
    assert_eq!(only_names(&archive).len(), 2);
    host.send(&ToInit::Leave);
    host.finish();
}

#[test]
fn links_lead_nowhere() {
    let mut host = Host::new();
    host.run_and_stay(&[
        "mkdir d real; echo x >real/f; ln -s /etc d/etc; ln -s /etc/passwd d/passwd; ln -s d/etc top; ln -s real near; \
         ln -s loop loop; ln real/f real/g; ln -s \"$(printf 'x%.0s' $(seq 200))\" long",
    ]);
    let (archive, said) = host.take(1, &["."], "");
    let taken = taken(said);
    let names = names_in(&archive);
    let expect = [
        ("d/", ""),
        ("d/etc", "-> /etc"),
        ("d/passwd", "-> /etc/passwd"),
        ("long", &format!("-> {}", "x".repeat(200))),
        ("loop", "-> loop"),
        ("near", "-> real"),
        ("real/", ""),
        ("real/f", "x\n"),
        ("real/g", "-> real/f"),
        ("top", "-> d/etc"),
    ];
    assert_eq!(names, expect.map(|(name, content)| (name.to_owned(), content.to_owned())));
    assert_eq!((taken.files, taken.bytes, taken.unreadable), (10, 2, 0));
    // A path through a link is a path as long as it stays in.
    let (archive, _) = host.take(2, &["near/f"], "");
    assert_eq!(names_in(&archive), [("near/f".to_owned(), "x\n".to_owned())]);
    for path in ["d/etc/passwd", "top/passwd", "d/etc/ssl/*"] {
        let (archive, said) = host.take(3, &[path], "");
        assert!(archive.is_empty(), "{path}");
        assert!(refusal(said).contains("leads out"), "{path}");
    }
    // What is a link itself is no folder to look into.
    let (_, said) = host.take(4, &["d/etc/*"], "");
    assert!(matches!(said, Said::Taken(taken) if taken.missing == [0]));
}

#[test]
fn special_files_are_left_out() {
    let mut host = Host::new();
    host.run_and_stay(&[
        "mkdir d; mkfifo d/fifo fifo; echo x >d/f; cp -a /dev/null d/null 2>/dev/null || mkfifo d/null",
    ]);
    let (archive, said) = host.take(1, &["d", "fifo"], "");
    assert_eq!(only_names(&archive), ["d/", "d/f"]);
    let taken = taken(said);
    assert_eq!((taken.specials, taken.files, taken.missing), (3, 2, vec![]));
    // Nor is anything waited for, or read, that only looks like files.
    let (archive, said) = host.take(2, &["/dev/zero", "/proc/self/mem", "/dev/stdin"], "/");
    assert!(matches!(said, Said::Taken(_)), "{said:?}");
    assert!(names_in(&archive).iter().all(|(_, content)| content.len() < 100));
}

#[test]
fn limits_hold() {
    let mut host = Host::new();
    host.run_and_stay(&[
        "head -c 1000 /dev/zero >a; head -c 1000 /dev/zero >b; truncate -s 1T huge; mkdir e",
    ]);
    let mut ask = |paths: &[&str], max_bytes, max_files| {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        host.send(&ToInit::Take(Take { id: 1, paths, base: Vec::new(), max_bytes, max_files }));
        loop {
            match host.hear() {
                Said::Data(_) => {}
                said => break said,
            }
        }
    };
    assert!(matches!(ask(&["?"], 2000, 3), Said::Taken(_)));
    assert!(refusal(ask(&["?"], 1999, 3)).contains("more than 1999 bytes"));
    assert!(refusal(ask(&["?"], 2000, 2)).contains("more than 2 files"));
    assert!(refusal(ask(&["huge"], 1 << 30, 3)).contains("huge"));
}

#[test]
fn ten_thousand_files_come_whole_and_in_order() {
    let mut host = Host::in_memory();
    host.run_and_stay(&[
        "i=0; while [ $i -lt 100 ]; do mkdir d$i; j=0; while [ $j -lt 100 ]; do echo $i-$j >d$i/f$j; j=$((j+1)); done; i=$((i+1)); done",
    ]);
    let (archive, said) = host.take(1, &["d*"], "");
    assert_eq!(taken(said).files, 10_100);
    let names = names_in(&archive);
    assert_eq!(names.len(), 10_100);
    assert!(names.is_sorted());
    assert!(names.contains(&("d42/f17".to_owned(), "42-17\n".to_owned())));
    // The same again is the same.
    let (again, _) = host.take(2, &["d*"], "");
    assert!(archive == again);
    // And it goes in as it came out.
    let mut other = Host::in_memory();
    other.begin_put(1, "");
    let mut room = sealci_guest::wire::PUT_WINDOW_BYTES;
    for piece in archive.chunks(64 << 10) {
        while room < piece.len() {
            match other.hear() {
                Said::Room(bytes) => room += bytes as usize,
                said => panic!("{said:?}"),
            }
        }
        other.send_piece(piece);
        room -= piece.len();
    }
    other.send(&ToInit::PutEnd);
    let said = loop {
        match other.hear() {
            Said::Room(_) => {}
            said => break said,
        }
    };
    assert!(matches!(said, Said::Stored { files: 10_100, .. }), "{said:?}");
    other.run_and_stay(&["true"]);
    let (back, _) = other.take(2, &["d*"], "");
    assert!(archive == back, "modes, times and contents are kept");
}

#[test]
fn a_gigabyte_of_holes_passes_through() {
    let mut host = Host::new();
    host.run_and_stay(&["truncate -s 1G sparse"]);
    host.ask_take(1, &["sparse"], "");
    let mut bytes = 0u64;
    let said = loop {
        match host.hear() {
            Said::Data(piece) => bytes += piece.len() as u64,
            said => break said,
        }
    };
    assert_eq!(taken(said).bytes, 1 << 30);
    assert!(bytes > 1 << 30 && bytes < (1 << 30) + 10_000);
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 16 << 10, "{kib} KiB");
}

#[test]
fn files_that_change_do_not_break_the_archive() {
    let mut host = Host::new();
    host.run_and_stay(&["head -c 50000000 /dev/urandom >a; echo kept >z; head -c 50000000 /dev/urandom >b"]);
    host.ask_take(1, &["?"], "");
    let mut archive = match host.hear() {
        Said::Data(piece) => piece,
        said => panic!("{said:?}"),
    };
    // It is in the midst of `a`: that shrinks, the next grows, and one goes.
    std::fs::OpenOptions::new().write(true).open(host.work().join("a")).unwrap().set_len(10_000_000).unwrap();
    let said = loop {
        match host.hear() {
            Said::Data(piece) => {
                archive.extend(piece);
                let mut file = std::fs::OpenOptions::new().append(true).open(host.work().join("b")).unwrap();
                std::io::Write::write_all(&mut file, &[1; 1000]).unwrap();
            }
            said => break said,
        }
    };
    let count = taken(said).files;
    let mut entries = tar::Archive::new(&archive[..]);
    let mut sizes = Vec::new();
    for entry in entries.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        sizes.push((entry.path().unwrap().to_str().unwrap().to_owned(), content));
    }
    assert_eq!(sizes.len() as u64, count);
    assert_eq!(sizes[0].1.len(), 50_000_000);
    assert!(sizes[0].1[40_000_000..].iter().all(|byte| *byte == 0));
    assert_eq!(sizes.last().unwrap(), &("z".to_owned(), b"kept\n".to_vec()));
}

#[test]
fn what_cannot_be_read_is_named() {
    let mut host = Host::new();
    host.run_and_stay(&["mkdir open shut; echo a >open/a; echo b >open/b; echo c >shut/c; echo d >alone"]);
    for (name, mode) in [("open/b", 0), ("shut", 0)] {
        std::fs::set_permissions(host.work().join(name), std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let (archive, said) = host.take(1, &["open", "shut", "alone"], "");
    let taken = taken(said);
    if std::fs::read_dir(host.work().join("shut")).is_ok() {
        // Nothing is shut to this user; the agent's tests try it as others.
        assert_eq!(taken.unreadable, 0);
    } else {
        assert_eq!(only_names(&archive), ["alone", "open/", "open/a", "shut/"]);
        assert_eq!(taken.unreadable, 2);
        assert!(taken.unreadable_names[0].contains("open/b: Permission denied"), "{taken:?}");
    }
    std::fs::set_permissions(host.work().join("shut"), std::fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn folders_may_be_nested_deeply() {
    let mut host = Host::new();
    host.run_and_stay(&[
        "i=0; while [ $i -lt 1500 ]; do mkdir d && cd d; i=$((i+1)); done; echo deep >f; cd \"$SEALCI_BACK\" 2>/dev/null || true",
    ]);
    let (archive, said) = host.take(1, &["d"], "");
    let taken = taken(said);
    assert_eq!((taken.files, taken.unreadable), (1501, 0), "{:?}", taken.unreadable_names);
    let last = only_names(&archive).pop().unwrap();
    assert_eq!(last, "d/".repeat(1500) + "f");
}
