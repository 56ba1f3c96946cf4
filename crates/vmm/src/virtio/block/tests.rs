use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;

use proptest::prelude::*;

use super::super::driver::{DATA, Driver, MEMORY_BYTES, Part};
use super::*;

const STATUS: u64 = DATA;
const BUFFER: u64 = DATA + 0x1000;

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut file = file.try_clone().unwrap();
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn writable(file: &File) -> Block {
    Block::new(file.try_clone().unwrap(), Access::ReadWrite, "scratch").unwrap()
}

const FEATURES: u64 = FEATURE_FLUSH;

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// Makes a request, and says its status and how much was written into it.
fn ask(driver: &mut Driver, kind: u32, sector: u64, parts: &[Part<'_>]) -> (u8, u32) {
    let header = header(kind, sector);
    let mut all = vec![Part::Read(&header)];
    all.extend_from_slice(parts);
    all.push(Part::Write(STATUS, 1));
    let chain = driver.offer(0, &all);
    driver.notify(0);
    let (head, written) = driver.used(0).unwrap();
    assert_eq!(head, chain);
    (driver.bytes(STATUS, 1)[0], written)
}

#[test]
fn a_disk_is_read_in_any_pieces() {
    let bytes: Vec<u8> = (0..4096u32).map(|index| (index / 16) as u8).collect();
    let disk = Block::new(file(&bytes), Access::ReadOnly, "root").unwrap();
    let mut driver = Driver::started(disk, FEATURE_READ_ONLY | FEATURE_SEG_MAX);
    assert_eq!(driver.config(0, 8), 8u64.to_le_bytes());
    assert_eq!(driver.config(12, 4), 254u32.to_le_bytes());
    let parts =
        [Part::Write(BUFFER, 100), Part::Write(BUFFER + 0x1000, 900), Part::Write(BUFFER + 0x2000, 24)];
    assert_eq!(ask(&mut driver, READ, 3, &parts), (0, 1025));
    let read =
        [driver.bytes(BUFFER, 100), driver.bytes(BUFFER + 0x1000, 900), driver.bytes(BUFFER + 0x2000, 24)]
            .concat();
    assert_eq!(read, bytes[1536..2560]);
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let disk = file(&[0; 1024]);
    let mut driver = Driver::started(writable(&disk), FEATURES);
    let head = header(WRITE, 1);
    let first = [&head[9..], &[7; 200]].concat();
    let parts = [Part::Read(&head[..9]), Part::Read(&first), Part::Read(&[8; 312]), Part::Write(STATUS, 1)];
    let chain = driver.offer(0, &parts);
    driver.notify(0);
    assert_eq!(driver.used(0), Some((chain, 1)));
    assert_eq!(content(&disk)[512..], [[7; 200].as_slice(), &[8; 312]].concat());
    // The status is the last byte of what is written, wherever that lies.
    let head = header(READ, 1);
    driver.offer(0, &[Part::Read(&head), Part::Write(BUFFER, 513)]);
    driver.notify(0);
    assert_eq!(
        (driver.bytes(BUFFER, 201), driver.bytes(BUFFER + 512, 1)),
        ([vec![7; 200], vec![8]].concat(), vec![0])
    );
}

#[test]
fn what_lies_outside_of_the_disk_is_an_error() {
    let disk = file(&[1; 2048]);
    let mut driver = Driver::started(writable(&disk), FEATURES);
    let two = Part::Write(BUFFER, 1024);
    assert_eq!(ask(&mut driver, READ, 2, &[two]), (0, 1025));
    for sector in [3, 4, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
        assert_eq!(ask(&mut driver, READ, sector, &[two]), (1, 1), "sector {sector}");
        assert_eq!(ask(&mut driver, WRITE, sector, &[Part::Read(&[9; 1024])]), (1, 1), "sector {sector}");
    }
    assert_eq!(ask(&mut driver, READ, 0, &[Part::Write(BUFFER, 100)]), (1, 1), "no whole sector");
    assert_eq!(ask(&mut driver, WRITE, 0, &[Part::Read(&[9; 100])]), (1, 1), "no whole sector");
    assert_eq!(content(&disk), [1; 2048]);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = file(&[1; 2048]);
    let block = Block::new(disk.try_clone().unwrap(), Access::ReadOnly, "root").unwrap();
    assert_eq!(block.features() & (FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES), 0);
    let mut driver = Driver::started(block, 0);
    assert_eq!(ask(&mut driver, WRITE, 0, &[Part::Read(&[9; 512])]), (1, 1));
    assert_eq!(ask(&mut driver, FLUSH, 0, &[]), (1, 1));
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(ask(&mut driver, kind, 0, &[Part::Read(&range(0, 1, 0))]), (2, 1));
    }
    assert_eq!(content(&disk), [1; 2048]);
}

#[test]
fn a_serial_number_is_told_and_unknown_requests_are_not_known() {
    let mut driver = Driver::started(writable(&file(&[0; 512])), FEATURES);
    assert_eq!(ask(&mut driver, SERIAL, 0, &[Part::Write(BUFFER, 20)]), (0, 21));
    assert_eq!(driver.bytes(BUFFER, 20), *b"scratch\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(ask(&mut driver, SERIAL, 0, &[Part::Write(BUFFER, 19)]), (1, 1));
    assert_eq!(ask(&mut driver, FLUSH, 0, &[]), (0, 1));
    for kind in [2, 3, 5, 99, u32::MAX] {
        assert_eq!(ask(&mut driver, kind, 0, &[Part::Write(BUFFER, 512)]), (2, 1));
    }
}

#[test]
fn a_file_that_ends_within_a_sector_is_filled_up() {
    let disk = file(&[5; 700]);
    let mut driver = Driver::started(writable(&disk), FEATURES);
    assert_eq!(driver.config(0, 8), 2u64.to_le_bytes());
    driver.data(&[0xff; 16]);
    assert_eq!(ask(&mut driver, READ, 0, &[Part::Write(BUFFER, 1024)]), (0, 1025));
    assert_eq!(driver.bytes(BUFFER, 1024), [vec![5; 700], vec![0; 324]].concat());
    assert_eq!(ask(&mut driver, WRITE, 1, &[Part::Read(&[6; 512])]), (0, 1));
    assert_eq!(content(&disk), [vec![5; 512], vec![6; 512]].concat());
}

#[test]
fn what_the_host_refuses_is_the_guests_error() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let mut driver = Driver::started(Block::with_bytes(full, 4096, Access::ReadWrite, ""), FEATURES);
    assert_eq!(ask(&mut driver, WRITE, 0, &[Part::Read(&[9; 512])]), (1, 1), "no room");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, [0; 1024]).unwrap();
    let blind = File::options().write(true).open(&path).unwrap();
    let mut driver = Driver::started(Block::new(blind, Access::ReadWrite, "").unwrap(), FEATURES);
    assert_eq!(ask(&mut driver, READ, 0, &[Part::Write(BUFFER, 512)]), (1, 1), "an I/O error");
    let disk = file(&[1; 2048]);
    let mut driver = Driver::started(writable(&disk), FEATURES);
    disk.set_len(512).unwrap();
    assert_eq!(ask(&mut driver, READ, 0, &[Part::Write(BUFFER, 1024)]), (1, 513), "a file that shrank");
    assert_eq!(ask(&mut driver, READ, 0, &[Part::Write(BUFFER, 512)]), (0, 513), "and the device lives on");
}

#[test]
fn a_guest_goes_on_with_another_file_of_the_same_size_only() {
    let saved = Driver::started(writable(&file(&[1; 1024])), FEATURES).transport.state();
    for (bytes, is_like) in [(1024, true), (1000, true), (1025, false), (512, false)] {
        let driver = Driver::new(writable(&file(&vec![2; bytes])));
        assert_eq!(driver.transport.restore(&saved).is_ok(), is_like, "{bytes}");
    }
    let read_only = Block::new(file(&[1; 1024]), Access::ReadOnly, "root").unwrap();
    Driver::new(read_only).transport.restore(&saved).unwrap_err();
}

#[test]
fn a_request_without_header_or_status_breaks_the_device() {
    let read = header(READ, 0);
    let write = header(WRITE, 0);
    let short: [&[Part<'_>]; 3] = [
        &[Part::Read(&read[..15]), Part::Write(STATUS, 1)],
        &[Part::Read(&write), Part::Read(&[1; 512])],
        &[Part::Write(STATUS, 1)],
    ];
    for parts in short {
        let mut driver = Driver::started(writable(&file(&[0; 512])), FEATURES);
        driver.offer(0, parts);
        driver.notify(0);
        assert_eq!(driver.transport.broken(), Some(Broken::Request));
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn ranges_are_discarded_and_cleared() {
    let disk = file(&vec![3; 1 << 20]);
    let mut driver = Driver::started(writable(&disk), FEATURES);
    let before = disk.metadata().unwrap().blocks();
    let two = [range(0, 512, 0), range(1024, 512, 0)].concat();
    assert_eq!(ask(&mut driver, DISCARD, 0, &[Part::Read(&two)]), (0, 1));
    assert!(disk.metadata().unwrap().blocks() < before, "room was given up");
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &[Part::Read(&range(513, 1, 0))]), (0, 1));
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &[Part::Read(&range(515, 2, 1))]), (0, 1));
    let mut expected = vec![3; 1 << 20];
    for cleared in [0..512, 1024..1536, 513..514, 515..517] {
        expected[cleared.start * 512..cleared.end * 512].fill(0);
    }
    assert_eq!(content(&disk), expected);
    for (wrong, status) in [
        (range(2047, 2, 0), 1),
        (range(u64::MAX, 1, 0), 1),
        (range(0, u32::MAX, 0), 1),
        (range(0, 1, 1), 2),
        (range(0, 1, 2), 2),
        (range(0, 1, 0)[..15].to_vec(), 1),
        (Vec::new(), 1),
        (range(0, 0, 0).repeat(33), 1),
    ] {
        assert_eq!(ask(&mut driver, DISCARD, 0, &[Part::Read(&wrong)]), (status, 1));
    }
    assert_eq!(content(&disk), expected);
}

/// One request of a random history.
#[derive(Debug, Clone)]
enum Request {
    Read { sector: u64, sectors: u32, cut: u32 },
    Write { sector: u64, sectors: u32, byte: u8 },
    Clear { kind: u32, sector: u64, sectors: u32 },
}

fn request() -> impl Strategy<Value = Request> {
    let (sector, sectors) = (0..20u64, 1..6u32);
    prop_oneof![
        (sector.clone(), sectors.clone(), 1..512u32).prop_map(|(sector, sectors, cut)| Request::Read {
            sector,
            sectors,
            cut
        }),
        (sector.clone(), sectors.clone(), any::<u8>()).prop_map(|(sector, sectors, byte)| Request::Write {
            sector,
            sectors,
            byte
        }),
        (prop_oneof![Just(DISCARD), Just(WRITE_ZEROES)], sector, sectors)
            .prop_map(|(kind, sector, sectors)| Request::Clear { kind, sector, sectors }),
    ]
}

proptest! {
    /// A disk of 16 sectors is as a list of bytes is, whatever is done with it.
    #[test]
    fn a_disk_keeps_what_is_written(history in prop::collection::vec(request(), 1..40)) {
        let mut model = vec![0xee; 16 * 512];
        let disk = file(&model);
        let mut driver = Driver::started(writable(&disk), FEATURES);
        for request in history {
            let (Request::Read { sector, sectors, .. }
            | Request::Write { sector, sectors, .. }
            | Request::Clear { sector, sectors, .. }) = request;
            let (from, to) = (sector as usize * 512, (sector as usize + sectors as usize) * 512);
            let status = u8::from(to > model.len());
            let bytes = sectors * 512;
            match request {
                Request::Read { cut, .. } => {
                    let far = MEMORY_BYTES as u64 / 4;
                    let parts = [Part::Write(BUFFER, cut), Part::Write(far, bytes - cut)];
                    prop_assert_eq!(ask(&mut driver, READ, sector, &parts).0, status);
                    if status == 0 {
                        let (head, rest) = (driver.bytes(BUFFER, cut as usize), driver.bytes(far, (bytes - cut) as usize));
                        prop_assert_eq!(&[head, rest].concat(), &model[from..to]);
                    }
                }
                Request::Write { byte, .. } => {
                    let data = vec![byte; bytes as usize];
                    prop_assert_eq!(ask(&mut driver, WRITE, sector, &[Part::Read(&data)]).0, status);
                    if status == 0 {
                        model[from..to].fill(byte);
                    }
                }
                Request::Clear { kind, .. } => {
                    let range = range(sector, sectors, 0);
                    prop_assert_eq!(ask(&mut driver, kind, 0, &[Part::Read(&range)]).0, status);
                    if status == 0 {
                        model[from..to].fill(0);
                    }
                }
            }
        }
        prop_assert_eq!(content(&disk), model);
    }
}
