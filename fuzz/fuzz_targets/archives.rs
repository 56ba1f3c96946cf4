//! Packs archives of files and reads them back, changed and unchanged: an index never leads out of its archive, and a file is what
//! was packed, or nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealci_archive::{ArchiveWriter, Entry, Extractor, Index, Progress, Tail, read_index};
use sealci_fuzz::{Input, tape, within};

fn index_of(archive: &[u8]) -> Option<Index> {
    let size = archive.len() as u64;
    let mut tail = &archive[archive.len().saturating_sub(100)..];
    loop {
        match read_index(tail, size).ok()? {
            Tail::Index(index) => return Some(index),
            Tail::Needs(bytes) => {
                assert!(bytes <= size && bytes > tail.len() as u64);
                tail = &archive[archive.len() - bytes as usize..];
            }
        }
    }
}

/// A file, up to so many bytes.
fn extracted(archive: &[u8], entry: &Entry, most: usize) -> Option<Vec<u8>> {
    let frame = &archive[entry.frame.offset as usize..(entry.frame.offset + entry.frame.length) as usize];
    let (mut pieces, mut bytes, mut buffer) = (frame.chunks(999), Vec::new(), [0; 777]);
    let mut extractor = Extractor::new(entry).ok()?;
    while bytes.len() < most {
        match extractor.read(&mut buffer).ok()? {
            Progress::Wrote(count) => bytes.extend_from_slice(&buffer[..count]),
            Progress::Done => break,
            Progress::NeedsInput => match pieces.next() {
                Some(piece) => extractor.feed(piece),
                None => {
                    extractor.input_ended().ok()?;
                    break;
                }
            },
        }
    }
    assert!(bytes.len() as u64 <= entry.size_bytes);
    Some(bytes)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    if input.byte() % 4 == 0 {
        let archive = input.rest();
        within((4 << 20) + 64 * data.len(), || {
            let index = index_of(archive).unwrap_or_default();
            for entry in index.files.iter().take(50) {
                extracted(archive, entry, 1 << 20);
            }
        });
        return;
    }
    let (piece, at, with) = (input.number() as usize % 5000 + 1, input.number() as usize, input.byte());
    let tar = tape(&mut input);
    let pack = || {
        let mut writer = ArchiveWriter::new(Vec::new()).ok()?;
        tar.chunks(piece).try_for_each(|piece| writer.push(piece)).ok()?;
        writer.finish().ok()
    };
    let Some((mut archive, _)) = pack() else { return };
    let index = index_of(&archive).expect("the index of what was packed");
    let files: Vec<_> = index
        .files
        .iter()
        .map(|entry| extracted(&archive, entry, usize::MAX).expect("what was packed"))
        .collect();
    for (entry, bytes) in index.files.iter().zip(&files) {
        assert_eq!(bytes.len() as u64, entry.size_bytes);
        assert!(tar.len() >= bytes.len());
    }
    let at = at % archive.len();
    archive[at] ^= with;
    for entry in index_of(&archive).unwrap_or_default().files.iter().take(50) {
        extracted(&archive, entry, 1 << 20);
    }
});
