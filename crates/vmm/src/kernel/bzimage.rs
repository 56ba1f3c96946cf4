//! Reads the bzImage: what distributions install, which unpacks itself.
//!
//! ```text
//!   0      0x1f1              (setup_sects + 1) × 512             + syssize × 16
//!   ├──────┼ setup header ────┼ protected-mode part ──────────────┼ signatures ─▶
//! ```
//! After Documentation/arch/x86/boot.rst of Linux, for protocol 2.12 and newer.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestAddress};

use super::{KernelError, Loaded, Source};
use crate::memory::GuestMemory;

const HEADER_OFFSET: u64 = 0x1f1;
const HEADER_BYTES: usize = size_of::<setup_header>();
const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const SECTOR: u64 = 512;
/// The first that has `xloadflags`: Linux 3.8.
const MIN_VERSION: u16 = 0x020c;
/// The kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry lies in the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// Where the protected-mode part is put: it moves itself to where it wants to be unpacked.
const LOAD_ADDRESS: u64 = 1 << 20;

#[derive(Debug)]
pub struct Image {
    header: setup_header,
    offset: u64,
    bytes: u64,
}

impl Image {
    /// None where the file is no bzImage.
    pub fn read(source: &Source) -> Result<Option<Self>, KernelError> {
        let Some(bytes) = source.read::<HEADER_BYTES>(HEADER_OFFSET)? else { return Ok(None) };
        let mut header = setup_header::default();
        header.as_mut_slice().copy_from_slice(&bytes);
        if (header.boot_flag, header.header) != (BOOT_FLAG, MAGIC) {
            return Ok(None);
        }
        if header.version < MIN_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
            let architecture = "x86 with 32 bits, or older than Linux 3.8".to_owned();
            return Err(KernelError::Foreign { path: source.path.clone(), architecture });
        }
        // Zero stands for four, for the sake of very old boot loaders.
        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let (offset, bytes) = ((sectors + 1) * SECTOR, u64::from(header.syssize) * 16);
        if bytes <= ENTRY_64 {
            return Err(source.damaged("it has no code"));
        }
        source.must_reach(offset + bytes)?;
        Ok(Some(Self { header, offset, bytes }))
    }

    /// Where in the file the packed kernel lies, and how many bytes it has.
    pub fn payload(&self, source: &Source) -> Result<(u64, u64), KernelError> {
        let (begin, bytes) = (u64::from(self.header.payload_offset), u64::from(self.header.payload_length));
        if bytes < 4 || begin + bytes > self.bytes {
            return Err(source.damaged("what is packed in it lies outside of it"));
        }
        Ok((self.offset + begin, bytes))
    }

    pub fn load(&self, source: &mut Source, memory: &GuestMemory) -> Result<Loaded, KernelError> {
        let unpacked = self.header.pref_address.checked_add(u64::from(self.header.init_size));
        let unpacked = unpacked.ok_or_else(|| source.damaged("it is unpacked behind all memory"))?;
        let end = unpacked.max(LOAD_ADDRESS + self.bytes);
        source.must_fit(memory, end)?;
        source.copy(memory, self.offset, self.bytes, GuestAddress(LOAD_ADDRESS))?;
        Ok(Loaded { entry: GuestAddress(LOAD_ADDRESS + ENTRY_64), end, header: Some(self.header) })
    }
}

#[cfg(test)]
pub mod tests {
    use vm_memory::Bytes;

    use super::super::Kernel;
    use super::super::tests::{complaint, file};
    use super::*;
    use crate::memory;

    /// One sector of setup and 1 KiB of code.
    fn image(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = setup_header {
            setup_sects: 1,
            syssize: 64,
            boot_flag: BOOT_FLAG,
            header: MAGIC,
            version: 0x020f,
            xloadflags: XLF_KERNEL_64,
            pref_address: 16 << 20,
            init_size: 32 << 20,
            ..Default::default()
        };
        change(&mut header);
        let mut bytes = vec![0; 1024];
        bytes[HEADER_OFFSET as usize..][..HEADER_BYTES].copy_from_slice(header.as_slice());
        bytes.extend((0..1024_u32).map(|index| index as u8));
        bytes
    }

    /// With such a payload behind the code.
    pub fn image_with(payload: &[u8], change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut bytes = image(|header| {
            header.payload_offset = 1024;
            header.payload_length = payload.len() as u32;
            header.syssize = (1024 + payload.len().div_ceil(16) * 16) as u32 / 16;
            change(header);
        });
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        bytes
    }

    #[test]
    fn it_is_entered_in_its_protected_mode_part() {
        let memory = memory::map(64).unwrap();
        let file = file(&image(|_| ()));
        let loaded = Kernel::open(file.path()).unwrap().load(&memory).unwrap();
        assert_eq!(loaded.entry, GuestAddress(0x10_0200));
        assert_eq!(loaded.end, 48 << 20);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0201)).unwrap(), 1);
    }

    #[test]
    fn a_truncated_one_is_said_to_be() {
        let whole = image(|_| ());
        for length in [whole.len() - 1, 1024, 1023] {
            let complaint = complaint(&whole[..length]);
            assert!(complaint.contains("says that it has 2048 bytes"), "{complaint}");
        }
    }

    #[test]
    fn odd_headers_are_refused() {
        assert!(complaint(&image(|header| header.xloadflags = 0)).contains("32 bits"));
        assert!(complaint(&image(|header| header.version = 0x0204)).contains("32 bits"));
        assert!(complaint(&image(|header| header.syssize = 1)).contains("no code"));
        assert!(complaint(&image(|header| header.syssize = u32::MAX)).contains("truncated"));
    }

    #[test]
    fn too_little_memory_is_said_to_be() {
        let memory = memory::map(64).unwrap();
        let complaint = |change: fn(&mut setup_header)| {
            let file = file(&image(change));
            Kernel::open(file.path()).unwrap().load(&memory).unwrap_err().to_string()
        };
        assert!(complaint(|header| header.init_size = 100 << 20).contains("needs 116 MiB of memory"));
        assert!(complaint(|header| header.pref_address = u64::MAX).contains("behind all memory"));
    }
}
