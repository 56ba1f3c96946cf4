//! What an init does with archives, whole ones and others.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use sealci_guest::wire::{Ending, PUT_WINDOW_BYTES, ToInit};
use tar::{Builder, EntryType, Header};

use crate::host::{Host, Said};

/// One more entry, whatever its name may be.
fn add(archive: &mut Vec<u8>, name: &[u8], kind: EntryType, link: &[u8], content: &[u8]) {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o640);
    header.set_mtime(1_000_000_000);
    let fields = header.as_old_mut();
    fields.name[..name.len()].copy_from_slice(name);
    fields.linkname[..link.len()].copy_from_slice(link);
    header.set_cksum();
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

fn end(archive: &mut Vec<u8>) {
    archive.resize(archive.len() + 1024, 0);
}

fn archive_of(entries: &[(&str, EntryType, &str, &str)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, kind, link, content) in entries {
        add(&mut archive, name.as_bytes(), *kind, link.as_bytes(), content.as_bytes());
    }
    end(&mut archive);
    archive
}

fn refusal(said: Said) -> String {
    match said {
        Said::Refused { why, .. } => why,
        other => panic!("{other:?}"),
    }
}

const FILE: EntryType = EntryType::Regular;

#[test]
fn an_archive_is_unpacked_as_it_is() {
    let mut host = Host::new();
    std::fs::create_dir(host.work().join("there")).unwrap();
    std::fs::write(host.work().join("there/file"), "old and longer").unwrap();
    symlink("/etc/passwd", host.work().join("there/link")).unwrap();
    symlink("/etc", host.work().join("there/folder")).unwrap();
    let archive = archive_of(&[
        ("./", EntryType::Directory, "", ""),
        ("there/file", FILE, "", "new"),
        ("there/link", FILE, "", "in its place"),
        ("there/folder/", EntryType::Directory, "", ""),
        ("there/folder/a", FILE, "", "a"),
        ("there/hard", EntryType::Link, "there/file", ""),
        ("there/soft", EntryType::Symlink, "../../nowhere", ""),
        ("not/there/before", FILE, "", ""),
        ("old-style/", FILE, "", ""),
    ]);
    assert_eq!(host.put(7, "", &archive), Said::Stored { id: 7, files: 8, bytes: 16 });
    let work = host.work();
    let read = |name: &str| std::fs::read_to_string(work.join(name)).unwrap();
    assert_eq!(
        (&*read("there/file"), &*read("there/link"), &*read("there/folder/a")),
        ("new", "in its place", "a")
    );
    let meta = |name: &str| std::fs::symlink_metadata(work.join(name)).unwrap();
    assert_eq!(meta("there/file").permissions().mode() & 0o7777, 0o640);
    assert_eq!(meta("there/file").ino(), meta("there/hard").ino());
    assert!(meta("there/folder").is_dir() && meta("old-style").is_dir());
    assert_eq!(std::fs::read_link(work.join("there/soft")).unwrap(), Path::new("../../nowhere"));
    for name in ["there/file", "there/soft", "there/folder", "old-style"] {
        assert_eq!(meta(name).mtime(), 1_000_000_000, "{name}");
    }
    // And then the commands.
    let start = host.start_of(&["cat there/file; ls not/there"]);
    host.start(start);
    assert_eq!(host.finish(), ("newbefore\n".to_owned(), Ending::Succeeded));
}

#[test]
fn a_root_is_read_as_people_mean_it() {
    let mut host = Host::new();
    let archive = archive_of(&[("f", FILE, "", "x")]);
    let folder = host.folder.path().to_owned();
    let absolute = folder.join("elsewhere/deep");
    for (root, found) in
        [("sub/dir", host.work().join("sub/dir/f")), (absolute.to_str().unwrap(), absolute.join("f"))]
    {
        assert!(matches!(host.put(1, root, &archive), Said::Stored { .. }), "{root}");
        assert!(found.exists());
    }
    let home = folder.join("home").to_str().unwrap().as_bytes().to_vec();
    let put = sealci_guest::wire::Put {
        id: 2,
        root: b"~/.cache".to_vec(),
        workdir: b"/".to_vec(),
        home: Some(home),
    };
    host.send(&ToInit::Put(put));
    host.send_piece(&archive);
    host.send(&ToInit::PutEnd);
    assert!(matches!(host.hear(), Said::Stored { .. }));
    assert!(folder.join("home/.cache/f").exists());
    std::fs::write(host.work().join("file"), "").unwrap();
    assert!(refusal(host.put(3, "file", &archive)).contains("cannot make the folder"));
}

#[test]
fn what_leads_out_is_refused() {
    let outside = tempfile::TempDir::new().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, "untouched").unwrap();
    let out = outside.path().to_str().unwrap();
    let secret_name = secret.to_str().unwrap();
    for (entries, part) in [
        (&[("../up", FILE, "", "x")][..], "leads out"),
        (&[("a/../../up", FILE, "", "x")], "leads out"),
        (&[(secret_name, FILE, "", "x")], "leads out"),
        (&[("l", EntryType::Symlink, out, ""), ("l/secret", FILE, "", "x")], "is not a folder"),
        (&[("l", EntryType::Symlink, out, ""), ("l/new", EntryType::Symlink, "x", "")], "is not a folder"),
        (&[("l", EntryType::Symlink, out, ""), ("l/d/", EntryType::Directory, "", "")], "is not a folder"),
        (&[("h", EntryType::Link, secret_name, "")], "leads out"),
        (&[("h", EntryType::Link, "../../secret", "")], "leads out"),
        (&[("l", EntryType::Symlink, secret_name, ""), ("h", EntryType::Link, "l", "")], "is not a file"),
        (&[("l", EntryType::Symlink, out, ""), ("h", EntryType::Link, "l/secret", "")], "is not a folder"),
        (&[("h", EntryType::Link, "", "")], "leads out"),
        (&[("dev", EntryType::Char, "", "")], "neither file"),
        (&[("dev", EntryType::Block, "", "")], "neither file"),
        (&[("fifo", EntryType::Fifo, "", "")], "neither file"),
        (&[("sparse", EntryType::GNUSparse, "", "")], "neither file"),
        (&[("d/", EntryType::Directory, "", ""), ("d", FILE, "", "x")], "directory"),
        (&[("f", FILE, "", ""), ("f/x", FILE, "", "x")], "is not a folder"),
    ] {
        let mut host = Host::new();
        let why = refusal(host.put(1, "", &archive_of(entries)));
        assert!(why.contains(part), "{entries:?}: {why}");
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "untouched");
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1, "{entries:?}");
        assert!(!host.work().join("../up").exists());
        // It goes on all the same.
        assert!(matches!(host.put(2, "x", &archive_of(&[("f", FILE, "", "")])), Said::Stored { id: 2, .. }));
        let start = host.start_of(&["true"]);
        host.start(start);
        assert_eq!(host.finish().1, Ending::Succeeded);
    }
}

#[test]
fn what_is_no_whole_archive_is_refused() {
    let whole = archive_of(&[("a", FILE, "", "content"), ("b", FILE, "", &"x".repeat(2000))]);
    let mut long_name = Vec::new();
    add(&mut long_name, b"././@LongLink", EntryType::GNULongName, b"", &vec![b'n'; 100 << 10]);
    add(&mut long_name, b"f", FILE, b"", b"");
    end(&mut long_name);
    let mut endless_name = Vec::new();
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(u64::MAX / 2);
    header.set_cksum();
    endless_name.extend_from_slice(header.as_bytes());
    endless_name.resize(64 << 10, b'n');
    let mut two_sizes = Vec::new();
    add(&mut two_sizes, b"x", EntryType::XHeader, b"", b"13 size=1000\n");
    add(&mut two_sizes, b"f", FILE, b"", b"");
    end(&mut two_sizes);
    for (archive, part) in [
        (&whole[..0], "breaks off"),
        (&whole[..100], "not a whole"),
        (&whole[..512], "cannot unpack"),
        (&whole[..514], "cannot unpack"),
        (&whole[..700], "not a whole"),
        (&whole[..1024], "breaks off"),
        (&whole[..2500], "cannot unpack"),
        (&whole[..whole.len() - 1024], "breaks off"),
        (&[0x55; 5000][..], "not a whole"),
        (&b"\x1f\x8b\x08 this is not a tar".repeat(100)[..], "not a whole"),
        (&long_name[..], "too long"),
        (&endless_name[..], "too long"),
        (&two_sizes[..], "two sizes"),
    ] {
        let mut host = Host::new();
        let why = refusal(host.put(1, "", archive));
        assert!(why.contains(part), "{}: {why}", archive.len());
        assert!(matches!(host.put(2, "", &whole), Said::Stored { files: 2, bytes: 2007, .. }));
    }
    // One block of zeros, and what stands behind the end, are no reason to refuse.
    let mut host = Host::new();
    assert!(matches!(host.put(1, "", &whole[..whole.len() - 512]), Said::Stored { .. }));
    assert!(matches!(host.put(2, "", &[&whole[..], &[7; 100_000]].concat()), Said::Stored { .. }));
    assert!(matches!(host.put(3, "", &[0; 512]), Said::Stored { files: 0, .. }));
}

#[test]
fn garbage_of_any_kind_does_no_harm() {
    use proptest::prelude::*;
    let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
    let whole = {
        let mut archive = archive_of(&[("d/", EntryType::Directory, "", ""), ("d/a", FILE, "", "content")]);
        add(&mut archive, b"x", EntryType::XHeader, b"", b"20 mtime=123.456789\n");
        archive.extend(archive_of(&[("f", FILE, "", &"y".repeat(3000)), ("l", EntryType::Symlink, "d", "")]));
        archive
    };
    let host = std::cell::RefCell::new(Host::new());
    proptest!(config, |(flips in prop::collection::vec((0..whole.len(), any::<u8>()), 0..12), cut in 0..=whole.len())| {
        let mut archive = whole[..cut].to_vec();
        for (place, byte) in flips {
            if let Some(found) = archive.get_mut(place) {
                *found = byte;
            }
        }
        let said = host.borrow_mut().put(1, "x", &archive);
        prop_assert!(matches!(said, Said::Stored { .. } | Said::Refused { .. }), "{:?}", said);
    });
    let mut host = host.into_inner();
    let start = host.start_of(&["true"]);
    host.start(start);
    assert_eq!(host.finish().1, Ending::Succeeded);
}

#[test]
fn room_is_told_of_as_it_is_made() {
    let mut host = Host::new();
    let size = 40 << 20;
    let mut archive = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o600);
    let content: Vec<u8> = (0..size).map(|n| (n % 251) as u8).collect();
    archive.append_data(&mut header, "big", &content[..]).unwrap();
    let archive = archive.into_inner().unwrap();
    host.begin_put(1, "");
    let (mut sent, mut room) = (0, PUT_WINDOW_BYTES);
    while sent < archive.len() {
        let count = room.min(128 << 10).min(archive.len() - sent);
        if count == 0 {
            match host.hear() {
                Said::Room(bytes) => room += bytes as usize,
                other => panic!("{other:?}"),
            }
            continue;
        }
        host.send_piece(&archive[sent..sent + count]);
        sent += count;
        room -= count;
    }
    host.send(&ToInit::PutEnd);
    let said = loop {
        match host.hear() {
            Said::Room(_) => {}
            said => break said,
        }
    };
    assert_eq!(said, Said::Stored { id: 1, files: 1, bytes: size });
    assert!(std::fs::read(host.work().join("big")).unwrap() == content);
    // Nor has it held much of it at any time.
    let status = std::fs::read_to_string(format!("/proc/{}/status", host.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 16 << 10, "{kib} KiB");
}

#[test]
fn a_put_that_is_stopped_is_answered() {
    let mut host = Host::new();
    host.begin_put(1, "");
    host.begin_put(2, "");
    assert!(matches!(host.hear(), Said::Refused { id: 2, .. }));
    host.send(&ToInit::Stop { id: 1 });
    assert!(matches!(host.hear(), Said::Refused { id: 1, .. }));
    // What was on its way already is nobody's.
    host.send_piece(b"late");
    host.send(&ToInit::PutEnd);
    assert!(matches!(host.put(3, "", &archive_of(&[("f", FILE, "", "")])), Said::Stored { id: 3, .. }));
    let start = host.start_of(&["true"]);
    host.start(start);
    host.finish();
}

#[test]
fn a_full_disk_is_a_reason_and_no_end() {
    // Full for every write.
    let mut host = Host::new();
    let mut archive = Vec::new();
    add(&mut archive, b"shm/sealci-test-never", FILE, b"", b"x");
    end(&mut archive);
    let why = refusal(host.put(1, "/proc", &archive));
    assert!(why.contains("cannot unpack `shm/"), "{why}");
    host.stream.flush().unwrap();
}
