//! Writes what the kernel reads first: its boot parameters, command line and initial RAM disk.
//!
//! After Documentation/arch/x86/boot.rst and zero-page.rst of Linux.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::layout;
use crate::kernel::Loaded;
use crate::memory::{self, GuestMemory};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// A boot loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;
/// The initial RAM disk's highest address where the kernel does not say.
const INITRAMFS_MAX: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;

/// Why the kernel cannot be given what it reads first.
#[derive(Debug, Error)]
pub enum BootError {
    #[error("the command line has {bytes} bytes, of which the kernel reads {max}: shorten it")]
    CommandLine { bytes: usize, max: usize },
    #[error("the command line has a byte that ends it early: remove NUL and line ends")]
    CommandLineByte,
    #[error("cannot read the initial RAM disk {}", path.display())]
    Initramfs { path: PathBuf, source: io::Error },
    #[error(
        "the initial RAM disk {} of {bytes} bytes does not fit beside the kernel: give the guest more memory",
        path.display()
    )]
    InitramfsTooLarge { path: PathBuf, bytes: u64 },
    #[error("cannot write in the guest's memory")]
    Write(#[from] GuestMemoryError),
}

/// What every kernel is told: it resets by a triple fault, which ends the machine, also after a panic; it does not look for
/// a keyboard, and trusts the processor's clock and random numbers, as on this machine it can. Nor does it try whether its
/// cryptography reckons right, which is more than half of a boot of Debian's.
const COMMAND_LINE: &str = "reboot=t panic=-1 i8042.noaux i8042.nokbd tsc=reliable no_timer_check random.trust_cpu=on \
                            cryptomgr.notests";
const WITHOUT_SERIAL: &str = "quiet loglevel=1 8250.nr_uarts=0";
const WITH_SERIAL: &str = "console=ttyS0 8250.nr_uarts=1";

/// The kernel's whole command line.
pub fn command_line(has_serial: bool, extra: &str) -> String {
    let console = if has_serial { WITH_SERIAL } else { WITHOUT_SERIAL };
    format!("{COMMAND_LINE} {console} {extra}").trim_end().to_owned()
}

/// Where the initial RAM disk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initramfs {
    address: u64,
    bytes: u64,
}

/// Puts the initial RAM disk as high as the kernel takes it, away from what the kernel unpacks.
pub fn load_initramfs(memory: &GuestMemory, kernel: &Loaded, path: &Path) -> Result<Initramfs, BootError> {
    let unreadable = |source| BootError::Initramfs { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let bytes = file.metadata().map_err(unreadable)?.len();
    let max = kernel.header.map_or(INITRAMFS_MAX, |header| u64::from(header.initrd_addr_max));
    let end = memory::low_bytes(memory).min(max + 1);
    let address = end.checked_sub(bytes).map(|address| address & !(PAGE - 1));
    let address = address.filter(|address| *address >= kernel.end);
    let address = address.ok_or_else(|| BootError::InitramfsTooLarge { path: path.to_owned(), bytes })?;
    memory.read_exact_volatile_from(GuestAddress(address), &mut file, bytes as usize)?;
    Ok(Initramfs { address, bytes })
}

/// Writes the command line and the boot parameters.
pub fn write_parameters(
    memory: &GuestMemory,
    kernel: &Loaded,
    command_line: &str,
    initramfs: Option<Initramfs>,
    rsdp: u64,
) -> Result<(), BootError> {
    let mut header = kernel.header.unwrap_or_else(plain_header);
    let max = (header.cmdline_size as usize).min(layout::COMMAND_LINE_BYTES - 1);
    if command_line.len() > max {
        return Err(BootError::CommandLine { bytes: command_line.len(), max });
    }
    if command_line.bytes().any(|byte| byte == 0 || byte == b'\n') {
        return Err(BootError::CommandLineByte);
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(layout::COMMAND_LINE))?;
    memory.write_obj(0_u8, GuestAddress(layout::COMMAND_LINE + command_line.len() as u64))?;

    header.type_of_loader = UNKNOWN_LOADER;
    header.cmd_line_ptr = layout::COMMAND_LINE as u32;
    if let Some(initramfs) = initramfs {
        header.ramdisk_image = initramfs.address as u32;
        header.ramdisk_size = initramfs.bytes as u32;
    }
    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    let map = memory_map(memory);
    parameters.e820_entries = map.len() as u8;
    let mut table = parameters.e820_table;
    table[..map.len()].copy_from_slice(&map);
    parameters.e820_table = table;
    memory.write_obj(parameters, GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

/// What a bzImage would say of a kernel that comes without one.
fn plain_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x020f,
        kernel_alignment: 2 << 20,
        initrd_addr_max: INITRAMFS_MAX as u32,
        cmdline_size: 2047,
        ..Default::default()
    }
}

fn memory_map(memory: &GuestMemory) -> Vec<boot_e820_entry> {
    let entry = |begin: u64, end: u64, kind| boot_e820_entry { addr: begin, size: end - begin, r#type: kind };
    let mut map = vec![
        entry(0, layout::LOW_END, E820_RAM),
        entry(layout::LOW_END, layout::HIGH_BEGIN, E820_RESERVED),
        entry(layout::HIGH_BEGIN, memory::low_bytes(memory), E820_RAM),
    ];
    let high = memory.iter().filter(|region| region.start_addr().0 != 0);
    map.extend(
        high.map(|region| entry(region.start_addr().0, region.start_addr().0 + region.len(), E820_RAM)),
    );
    map
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    fn kernel(end: u64) -> Loaded {
        Loaded { entry: GuestAddress(0), end, header: None }
    }

    #[test]
    fn the_parameters_are_where_the_kernel_looks() {
        let memory = memory::map(6144).unwrap();
        let initramfs = Initramfs { address: 0x4000_0000, bytes: 77 };
        write_parameters(&memory, &kernel(0), "quiet", Some(initramfs), 0xe_0000).unwrap();
        let at = |offset: u64| memory.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + offset)).unwrap();
        // The offsets are zero-page.rst's and boot.rst's.
        assert_eq!(at(0x070), 0xe_0000);
        assert_eq!(at(0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!((at(0x218), at(0x21c)), (0x4000_0000, 77));
        let line: [u8; 6] = memory.read_obj(GuestAddress(u64::from(at(0x228)))).unwrap();
        assert_eq!(&line, b"quiet\0");
        assert_eq!(at(0x1e8) & 0xff, 4);
        // The last range: 3 GiB of memory from 4 GiB on.
        let last = 0x2d0 + 3 * 20;
        assert_eq!((at(last), at(last + 4), at(last + 8), at(last + 16)), (0, 1, 0xc000_0000, E820_RAM));
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_is_refused() {
        let memory = memory::map(64).unwrap();
        let write = |line: &str| write_parameters(&memory, &kernel(0), line, None, 0);
        write(&"x".repeat(2047)).unwrap();
        assert!(write(&"x".repeat(2048)).unwrap_err().to_string().contains("2048 bytes"));
        assert!(write("a\nb").is_err());
    }

    #[test]
    fn the_initial_ram_disk_ends_with_the_low_memory() {
        let memory = memory::map(64).unwrap();
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&[9; 5000]).unwrap();
        let loaded = load_initramfs(&memory, &kernel(48 << 20), file.path()).unwrap();
        assert_eq!(loaded, Initramfs { address: (64 << 20) - 8192, bytes: 5000 });
        assert_eq!(memory.read_obj::<u8>(GuestAddress(loaded.address + 4999)).unwrap(), 9);
        let error = load_initramfs(&memory, &kernel(64 << 20), file.path()).unwrap_err();
        assert!(error.to_string().contains("give the guest more memory"));
        assert!(load_initramfs(&memory, &kernel(0), Path::new("/does/not/exist")).is_err());
    }
}
