//! Asks a disk for anything as a hostile guest may: its file keeps its size, and one that is only read keeps its content.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{DATA, Guest, Input, address};
use sealci_vmm::virtio::Cause;
use sealci_vmm::virtio::block::{Access, Block};

const DISK_BYTES: usize = 8 << 10;
const CONTENT: [u8; DISK_BYTES] = [0xd5; DISK_BYTES];

thread_local! {
    /// In memory, and made once.
    static DISK: RefCell<Option<File>> = const { RefCell::new(None) };
}

fn disk() -> File {
    let made =
        || File::from(rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).expect("a file"));
    let disk = DISK.with_borrow_mut(|disk| disk.get_or_insert_with(made).try_clone().expect("a descriptor"));
    disk.write_all_at(&CONTENT, 0).expect("memory");
    disk
}

/// A request that is mostly right: header, data, status.
fn request(guest: &mut Guest, input: &mut Input<'_>) {
    let kind = u32::from(input.choice(&[0u8, 1, 4, 8, 11, 13, 2]));
    let sector = input.number();
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    guest.fill(DATA, &header);
    let (length, cut) = (input.choice(&[0u32, 512, 1024, 4096, 20, 16, 32, 8192]), input.byte());
    let at = address(input);
    if matches!(kind, 11 | 13) {
        let (sector, sectors, flags) = (input.number(), input.number() as u32, u32::from(input.byte()));
        let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        guest.fill(at, &range);
    }
    let writes = matches!(kind, 0 | 8);
    let first = u32::from(cut).min(length);
    guest.chain(
        0,
        &[
            (DATA, 16, false),
            (at, first, writes),
            (at.wrapping_add(first.into()), length - first, writes),
            (DATA + 16, 1, true),
        ],
    );
    guest.run(Cause::Queue(0));
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let choice = input.byte();
    let access = if choice & 1 == 0 { Access::ReadWrite } else { Access::ReadOnly };
    let disk = disk();
    let mut guest = Guest::new(Box::new(
        Block::new(disk.try_clone().expect("a descriptor"), access, "fuzz").expect("a disk"),
    ));
    guest.start(u64::from(choice >> 1) << 24 | u64::from(choice & 2) << 8);
    guest.play(&mut input, request);
    let size = disk.metadata().expect("a file").len();
    assert_eq!(size, DISK_BYTES as u64);
    if access == Access::ReadOnly {
        let mut content = [0; DISK_BYTES];
        disk.read_exact_at(&mut content, 0).expect("a file");
        assert!(content == CONTENT, "a disk that is only read was written");
    }
});
