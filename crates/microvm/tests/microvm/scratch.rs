//! Scratch disks, as e2fsprogs reads them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use sealci_microvm::scratch::{self, Blank, ScratchError};

use crate::lab::{output, skipped};

#[test]
fn a_scratch_disk_is_whole_and_takes_no_room() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    match scratch::make(&disk, 10 << 30) {
        Err(ScratchError::NoProgram) => {
            return skipped("a scratch disk is made", "there is no mkfs.ext4");
        }
        made => made.unwrap(),
    }
    let metadata = fs::metadata(&disk).unwrap();
    assert_eq!(metadata.len(), 10 << 30);
    assert!(metadata.blocks() * 512 < 4 << 20, "{} blocks", metadata.blocks());
    let fsck = scratch::program().unwrap().with_file_name("fsck.ext4");
    output(Command::new(fsck).args(["-f", "-n"]).arg(&disk));

    // Nobody's file is written over.
    assert!(matches!(scratch::make(&disk, 10 << 30), Err(ScratchError::Io { .. })));
    let nowhere = folder.path().join("small");
    assert!(matches!(scratch::make(&nowhere, 1 << 20), Err(ScratchError::TooSmall { .. })));
    assert!(!nowhere.exists());
}

#[test]
fn a_copy_of_a_blank_is_as_good_and_as_small() {
    let folder = tempfile::tempdir().unwrap();
    // What an agent that was killed has left.
    fs::write(folder.path().join("blank"), "half of one").unwrap();
    let blank = match Blank::make(folder.path(), 256 << 20) {
        Err(ScratchError::NoProgram) => {
            return skipped("a scratch disk is copied", "there is no mkfs.ext4");
        }
        made => made.unwrap(),
    };
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    blank.copy(&one).unwrap();
    blank.copy(&other).unwrap();
    let metadata = fs::metadata(&one).unwrap();
    assert_eq!((metadata.len(), blank.bytes()), (256 << 20, 256 << 20));
    assert!(metadata.blocks() * 512 < 4 << 20, "{} blocks", metadata.blocks());
    let fsck = scratch::program().unwrap().with_file_name("fsck.ext4");
    output(Command::new(fsck).args(["-f", "-n"]).arg(&one));
    output(Command::new("cmp").arg(&one).arg(folder.path().join("blank")));
    assert!(matches!(blank.copy(&one), Err(ScratchError::Io { .. })), "it is somebody's");
}
