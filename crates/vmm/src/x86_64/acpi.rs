//! Describes the machine to the guest by ACPI, of the kind without a PC's old hardware ("hardware-reduced").
//!
//! ```text
//! RSDP ──▶ XSDT ──▶ FADT ──▶ DSDT: virtio devices, the serial line where there is one, how to turn the machine off
//!              └──▶ MADT: processors and their interrupt controllers
//! ```
//! After the ACPI Specification 6.5.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, PackageBuilder, Path};
use acpi_tables::aml::{ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::GuestMemory;

const OEM: [u8; 6] = *b"SEALCI";
const OEM_TABLE: [u8; 8] = *b"SEALCIVM";
const OEM_REVISION: u32 = 1;
/// Of the FADT's `IAPC_BOOT_ARCH`: there is no VGA, and no clock that is asked by ports.
const NO_VGA: u16 = 1 << 2;
const NO_RTC: u16 = 1 << 5;
const TABLE_HEADER_BYTES: u32 = 36;

/// The type of the one state of sleep there is, S5, and the bit that enters it (4.8.3.7).
const OFF: u8 = 5;
const SLEEP_ENABLE: u8 = 1 << 5;

/// What there is.
#[derive(Debug, Clone, Copy)]
pub struct Description {
    pub vcpus: u8,
    /// How many virtio devices.
    pub devices: usize,
    pub has_serial: bool,
}

/// Writes all tables; the address of the first one, which the kernel is told.
pub fn write(memory: &GuestMemory, what: Description) -> Result<u64, GuestMemoryError> {
    let rsdp = layout::ACPI_BEGIN;
    let mut place = Place { memory, next: rsdp + Rsdp::len() as u64 };
    let dsdt = place.table(&bytes_of(&dsdt(what)))?;
    let fadt = place.table(&bytes_of(&fadt(dsdt).finalize()))?;
    let madt = place.table(&bytes_of(&madt(what.vcpus)))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place.table(&bytes_of(&xsdt))?;
    memory.write_slice(&bytes_of(&Rsdp::new(OEM, xsdt)), GuestAddress(rsdp))?;
    Ok(rsdp)
}

/// Whether a byte written to a port turns the machine off.
pub fn turns_off(port: u16, data: &[u8]) -> bool {
    port == layout::SLEEP_CONTROL && data == [OFF << 2 | SLEEP_ENABLE]
}

struct Place<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Place<'_> {
    fn table(&mut self, bytes: &[u8]) -> Result<u64, GuestMemoryError> {
        let address = self.next.next_multiple_of(16);
        self.memory.write_slice(bytes, GuestAddress(address))?;
        self.next = address + bytes.len() as u64;
        Ok(address)
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

fn fadt(dsdt: u64) -> FADTBuilder {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_RTC).into();
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS);
    fadt
}

fn madt(vcpus: u8) -> MADT {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt
}

/// A table that is bytecode.
struct Dsdt(Sdt);

impl Aml for Dsdt {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn dsdt(what: Description) -> Dsdt {
    let mut code = Vec::new();
    if what.has_serial {
        add_serial(&mut code);
    }
    for index in 0..what.devices {
        add_device(&mut code, index);
    }
    let mut off = PackageBuilder::new();
    off.add_element(&OFF);
    Name::new(Path::new("_S5_"), &off).to_aml_bytes(&mut code);
    let mut table = Sdt::new(*b"DSDT", TABLE_HEADER_BYTES, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&code);
    Dsdt(table)
}

/// A virtio device by its registers and its interrupt (Linux's `virtio_mmio` knows `LNRO0005`).
fn add_device(code: &mut Vec<u8>, index: usize) {
    let address = layout::DEVICES + index as u64 * layout::DEVICE_BYTES;
    let interrupt = layout::DEVICES_INTERRUPT + index as u32;
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&format!("V{index:03}")),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &index),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, address as u32, layout::DEVICE_BYTES as u32),
                        &Interrupt::new(true, true, false, false, interrupt),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(code);
}

fn add_serial(code: &mut Vec<u8>) {
    let ports = layout::COM1 as u16;
    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &0_usize),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, layout::COM1_INTERRUPT),
                        &IO::new(ports, ports, 0, layout::COM1_PORTS as u8),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn bytes(memory: &GuestMemory, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length = memory.read_obj::<u32>(GuestAddress(address + 4)).unwrap();
        bytes(memory, address, length as usize)
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_first_and_adds_up() {
        let memory = memory::map(64).unwrap();
        let what = Description { vcpus: 4, devices: layout::MAX_DEVICES, has_serial: true };
        let rsdp = bytes(&memory, write(&memory, what).unwrap(), Rsdp::len());
        assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 0, 0));
        let pointer = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let xsdt = table(&memory, pointer(&rsdp, 24));
        let (fadt, madt) = (table(&memory, pointer(&xsdt, 36)), table(&memory, pointer(&xsdt, 44)));
        let dsdt = table(&memory, pointer(&fadt, 140));
        for (table, name) in [(&xsdt, b"XSDT"), (&fadt, b"FACP"), (&madt, b"APIC"), (&dsdt, b"DSDT")] {
            assert_eq!((&table[..4], sum(table)), (&name[..], 0));
        }
        assert_eq!(madt.len(), 44 + 12 + 4 * 8);
        let devices = dsdt.windows(8).filter(|bytes| bytes == b"LNRO0005").count();
        assert_eq!(devices, layout::MAX_DEVICES);
        assert!(pointer(&rsdp, 24) + xsdt.len() as u64 <= layout::ACPI_END);
    }

    #[test]
    fn only_the_state_off_turns_it_off() {
        assert!(turns_off(layout::SLEEP_CONTROL, &[0x34]));
        assert!(!turns_off(layout::SLEEP_CONTROL, &[0x14]));
        assert!(!turns_off(layout::SLEEP_STATUS, &[0x34]));
    }
}
