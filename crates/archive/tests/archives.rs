//! Packs real tars and reads them back in every way there is, and what is no archive.

#![allow(clippy::unwrap_used)]

use std::io::Write as _;

use proptest::prelude::*;
use sealci_archive::{
    ArchiveError, ArchiveWriter, Entry, EntryKind, ExtractError, Extractor, Index, IndexError,
    OWN_FRAME_BYTES, Progress, Summary, Tail, read_index,
};
use sha2::{Digest as _, Sha256};

fn tar_of(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o640);
        tar.append_data(&mut header, path, &bytes[..]).unwrap();
    }
    tar.into_inner().unwrap()
}

fn packed(tar: &[u8], piece: usize) -> Result<(Vec<u8>, Summary), ArchiveError> {
    let mut writer = ArchiveWriter::new(Vec::new())?;
    for piece in tar.chunks(piece) {
        writer.push(piece)?;
    }
    writer.finish()
}

fn index_of(archive: &[u8]) -> Result<Index, IndexError> {
    let size = archive.len() as u64;
    let mut tail = &archive[archive.len().saturating_sub(100)..];
    loop {
        match read_index(tail, size)? {
            Tail::Index(index) => return Ok(index),
            Tail::Needs(bytes) => tail = &archive[archive.len() - usize::try_from(bytes).unwrap()..],
        }
    }
}

/// The file's bytes, read from its frame in small pieces.
fn extracted(archive: &[u8], entry: &Entry) -> Result<Vec<u8>, ExtractError> {
    let from = usize::try_from(entry.frame.offset).unwrap();
    let frame = &archive[from..from + usize::try_from(entry.frame.length).unwrap()];
    let mut pieces = frame.chunks(999);
    let mut extractor = Extractor::new(entry)?;
    let (mut bytes, mut buffer) = (Vec::new(), [0; 777]);
    loop {
        match extractor.read(&mut buffer)? {
            Progress::Wrote(count) => bytes.extend_from_slice(&buffer[..count]),
            Progress::Done => return Ok(bytes),
            Progress::NeedsInput => match pieces.next() {
                Some(piece) => extractor.feed(piece),
                None => {
                    extractor.input_ended()?;
                    return Ok(bytes);
                }
            },
        }
    }
}

fn noise(length: usize, seed: u32) -> Vec<u8> {
    let next = |state: &mut u32| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some((*state >> 24) as u8)
    };
    std::iter::successors(Some(seed), |_| Some(seed))
        .scan(seed, |state, _| next(state))
        .take(length)
        .collect()
}

#[test]
fn what_is_packed_is_what_stock_tools_unpack() {
    let own = usize::try_from(OWN_FRAME_BYTES).unwrap();
    let mut files: Vec<(String, Vec<u8>)> =
        (0..2000).map(|number| (format!("small/{number}"), noise(number % 700, number as u32))).collect();
    files.push(("empty".into(), Vec::new()));
    files.push(("large".into(), noise(5 * own + 17, 1)));
    files.push((format!("{}/long", "x".repeat(90).repeat(3)), b"after a long name".to_vec()));
    files.push(("zeros".into(), vec![0; 40 * own]));
    let tar = tar_of(&files);
    let (archive, summary) = packed(&tar, 4096).unwrap();
    assert_eq!(packed(&tar, 1 << 20).unwrap().1, summary, "however it comes");
    assert_eq!(summary.size_bytes, archive.len() as u64);
    assert_eq!(summary.sha256, <[u8; 32]>::from(Sha256::digest(&archive)));
    assert_eq!(summary.unpacked_bytes, files.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
    assert_eq!(zstd::decode_all(&archive[..]).unwrap(), tar);

    let index = index_of(&archive).unwrap();
    assert_eq!(index, summary.index);
    assert_eq!(index.files.len(), files.len());
    for (path, bytes) in &files {
        let entry = index.entry(path).unwrap();
        assert_eq!((entry.kind, entry.mode), (EntryKind::File, 0o640));
        assert!(extracted(&archive, entry).unwrap() == *bytes, "{path}");
        let is_large = bytes.len() >= own;
        assert!(is_large || entry.frame.length < 2 * OWN_FRAME_BYTES, "{path}: {entry:?}");
    }
    let frames: std::collections::BTreeSet<u64> =
        index.files.iter().map(|entry| entry.frame.offset).collect();
    assert!(frames.len() > 5 && frames.len() < 50, "small files share frames: {}", frames.len());
}

#[test]
fn links_and_folders_are_kept_and_all_else_is_refused() {
    let entry = |kind: tar::EntryType, path: &str, target: &str| {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_link_name_literal(target).unwrap();
        header.set_cksum();
        tar.append(&header, std::io::empty()).unwrap();
        packed(&tar.into_inner().unwrap(), 512)
    };
    let (_, link) = entry(tar::EntryType::Symlink, "a", "/etc/passwd").unwrap();
    assert_eq!(
        link.index.files[0].target.as_deref(),
        Some("/etc/passwd"),
        "what it says is its unpacker's concern"
    );
    let (_, folder) = entry(tar::EntryType::Directory, "./b/", "").unwrap();
    assert_eq!((folder.index.files[0].path.as_str(), folder.index.files[0].kind), ("b", EntryKind::Folder));
    assert!(entry(tar::EntryType::Directory, "./", "").unwrap().1.index.files.is_empty());
    for path in ["/etc/passwd", "../x", "a/../../x"] {
        let refused = entry(tar::EntryType::Regular, path, "").unwrap_err();
        assert!(matches!(refused, ArchiveError::Name(_)), "{refused}");
    }
    for kind in [tar::EntryType::Char, tar::EntryType::Block, tar::EntryType::Fifo] {
        assert!(matches!(entry(kind, "x", "").unwrap_err(), ArchiveError::Kind { .. }));
    }
    assert!(matches!(entry(tar::EntryType::Link, "x", "../y").unwrap_err(), ArchiveError::Name(_)));
}

#[test]
fn what_is_no_tar_is_no_archive() {
    let tar = tar_of(&[("a".into(), noise(3000, 3))]);
    for cut in [0, 1, 511, 512, 1000, 512 + 3072] {
        assert!(matches!(packed(&tar[..cut], 100).unwrap_err(), ArchiveError::Truncated), "{cut}");
    }
    let mut broken = tar.clone();
    broken[3] ^= 1;
    assert!(matches!(packed(&broken, 100).unwrap_err(), ArchiveError::Malformed(_)));
    let mut writer = ArchiveWriter::new(Vec::new()).unwrap();
    assert!(writer.write_all(&broken).unwrap_err().to_string().contains("sum is wrong"));
}

#[test]
fn too_many_files_are_refused_before_they_cost() {
    let tar = tar_of(&[("a".into(), Vec::new())]);
    let mut writer = ArchiveWriter::new(std::io::sink()).unwrap();
    let refused = (0..=sealci_archive::MAX_ENTRIES).find_map(|_| writer.push(&tar[..512]).err());
    assert!(matches!(refused, Some(ArchiveError::TooMany)), "{refused:?}");
}

/// An archive whose index says what it likes.
fn lying(archive: &[u8], change: impl FnOnce(&mut Index)) -> Vec<u8> {
    let mut index = index_of(archive).unwrap();
    change(&mut index);
    let json = serde_json::to_vec(&index).unwrap();
    let packed = zstd::bulk::compress(&json, 3).unwrap();
    let frames = archive.len()
        - (16 + 8)
        - u32::from_le_bytes(archive[archive.len() - 16..][..4].try_into().unwrap()) as usize;
    let mut lying = archive[..frames].to_vec();
    lying.extend(0x184D_2A5E_u32.to_le_bytes());
    lying.extend((packed.len() as u32 + 16).to_le_bytes());
    lying.extend(&packed);
    lying.extend((packed.len() as u32).to_le_bytes());
    lying.extend((json.len() as u32).to_le_bytes());
    lying.extend(b"SEALCIX1");
    lying
}

#[test]
fn an_index_that_lies_is_not_believed() {
    let (archive, _) = packed(&tar_of(&[("a".into(), noise(3000, 3))]), 4096).unwrap();
    let with = |change: fn(&mut Entry)| index_of(&lying(&archive, |index| change(&mut index.files[0])));
    assert!(with(|_| ()).is_ok());
    let lies: [fn(&mut Entry); 10] = [
        |entry| entry.path = "../../etc/passwd".into(),
        |entry| entry.path = "/etc/passwd".into(),
        |entry| entry.path = "a/./b".into(),
        |entry| entry.path = String::new(),
        |entry| entry.frame.length = 1 << 40,
        |entry| entry.frame.offset = u64::MAX,
        |entry| entry.skip_bytes = 1 << 40,
        |entry| entry.size_bytes = u64::MAX,
        |entry| entry.target = Some("x".into()),
        |entry| entry.mode = 0o170_000,
    ];
    for (number, lie) in lies.into_iter().enumerate() {
        let refused = with(lie);
        assert!(matches!(refused, Err(IndexError::Entry { entry: 0, .. })), "{number}: {refused:?}");
    }
    // A file that says it is longer than it is ends with an error, and gives nothing that is not its own.
    let longer = lying(&archive, |index| index.files[0].size_bytes = 1 << 30);
    let entry = index_of(&longer).unwrap().files.remove(0);
    assert!(matches!(extracted(&longer, &entry), Err(ExtractError::TooShort)));
    let shifted = lying(&archive, |index| {
        index.files[0].frame.offset = 1;
        index.files[0].frame.length -= 1;
    });
    let entry = index_of(&shifted).unwrap().files.remove(0);
    assert!(matches!(extracted(&shifted, &entry), Err(ExtractError::Damaged(_))));
}

#[test]
fn a_bomb_gives_no_more_than_it_said() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    let entry = Entry {
        path: "a".into(),
        kind: EntryKind::File,
        size_bytes: 10,
        mode: 0,
        target: None,
        frame: sealci_archive::Frame { offset: 0, length: bomb.len() as u64 },
        skip_bytes: 0,
    };
    assert_eq!(extracted(&bomb, &entry).unwrap(), [0; 10]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Damage is found or harmless; it never panics.
    #[test]
    fn damage_never_panics(at in 0_usize..10_000, with in any::<u8>(), cut in 0_usize..10_000) {
        let (archive, _) = packed(&tar_of(&[("a".into(), noise(3000, 3)), ("b".into(), noise(10, 4))]), 4096).unwrap();
        let mut damaged = archive.clone();
        let length = damaged.len();
        damaged[at % length] ^= with;
        damaged.truncate(length - cut % length);
        if let Ok(index) = index_of(&damaged) {
            for entry in &index.files {
                let _ = extracted(&damaged, entry);
            }
        }
    }

    #[test]
    fn any_tail_is_read_without_panic(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut tail = tail;
        let _ = read_index(&tail, tail.len() as u64);
        tail.extend(b"SEALCIX1");
        let _ = read_index(&tail, tail.len() as u64);
    }
}
