//! Sets a virtual CPU's registers: as the 64-bit boot protocol of Linux asks for it.

use std::mem::offset_of;

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::GuestMemory;

/// Why a virtual CPU cannot be prepared.
#[derive(Debug, Error)]
pub enum RegistersError {
    #[error("cannot write in the guest's memory")]
    Write(#[from] GuestMemoryError),
    #[error("KVM does not take a virtual CPU's {what}")]
    Set { what: &'static str, source: vmm_sys_util::errno::Error },
}

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_HUGE: u64 = 1 << 7;
/// How much the first page tables map: all that the kernel reads before it has its own.
const MAPPED_PAGES: u64 = 512;
const HUGE_PAGE: u64 = 2 << 20;

const CR0_PROTECTION: u64 = 1;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// The bit that is always set.
const RFLAGS: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// Of the local APIC.
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const DELIVER_NMI: u32 = 4 << 8;
const DELIVER_EXTERNAL: u32 = 7 << 8;

/// The descriptors that the boot protocol wants at these selectors, and a task's.
const GDT: [u64; 6] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff, 0];
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Writes the tables of segments and of the first GiB's pages.
pub fn write_tables(memory: &GuestMemory) -> Result<(), RegistersError> {
    memory.write_obj(GDT, GuestAddress(layout::GDT))?;
    let below = PAGE_PRESENT | PAGE_WRITABLE;
    memory.write_obj(layout::PDPT | below, GuestAddress(layout::PML4))?;
    memory.write_obj(layout::PAGE_DIRECTORY | below, GuestAddress(layout::PDPT))?;
    for index in 0..MAPPED_PAGES {
        let page = (index * HUGE_PAGE) | below | PAGE_HUGE;
        memory.write_obj(page, GuestAddress(layout::PAGE_DIRECTORY + index * 8))?;
    }
    Ok(())
}

/// Sets what every virtual CPU starts with.
pub fn prepare(vcpu: &VcpuFd) -> Result<(), RegistersError> {
    let set = |what| move |source| RegistersError::Set { what, source };
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries = [entry(MSR_MISC_ENABLE, FAST_STRINGS), entry(MSR_MTRR_DEFAULT, MTRR_ENABLE | WRITE_BACK)];
    // Two are far below the bound of a list.
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| set("model-specific registers")(vmm_sys_util::errno::Error::new(libc::E2BIG)))?;
    vcpu.set_msrs(&msrs).map_err(set("model-specific registers"))?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(set("floating-point registers"))?;
    let mut apic = vcpu.get_lapic().map_err(set("local APIC"))?;
    deliver(&mut apic, LINT0, DELIVER_EXTERNAL);
    deliver(&mut apic, LINT1, DELIVER_NMI);
    vcpu.set_lapic(&apic).map_err(set("local APIC"))
}

/// Sets where the first virtual CPU begins; the guest's kernel starts the others itself.
pub fn enter(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegistersError> {
    let set = |what| move |source| RegistersError::Set { what, source };
    let regs = kvm_regs {
        rip: entry.0,
        rsi: layout::ZERO_PAGE,
        rsp: layout::STACK_TOP,
        rbp: layout::STACK_TOP,
        rflags: RFLAGS,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(set("registers"))?;
    let mut sregs = vcpu.get_sregs().map_err(set("system registers"))?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = size_of_val(&GDT) as u16 - 1;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE);
    let data = segment(DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK);
    sregs.cr0 |= CR0_PROTECTION | CR0_EXTENSION | CR0_PAGING;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_MODE;
    vcpu.set_sregs(&sregs).map_err(set("system registers"))
}

/// What the processor keeps of a descriptor (Intel's manual, volume 3, 3.4.5).
fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(selector / 8)];
    let bit = |at: u32| (descriptor >> at & 1) as u8;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: (descriptor >> 45 & 3) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: 0,
        padding: 0,
    }
}

fn deliver(apic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const { assert!(offset_of!(kvm_lapic_state, regs) == 0) };
    for (byte, value) in apic.regs[register..register + 4].iter_mut().zip(mode.to_le_bytes()) {
        *byte = value as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_first_gibibyte_is_mapped_to_itself() {
        let memory = memory::map(64).unwrap();
        write_tables(&memory).unwrap();
        let at = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
        assert_eq!(at(layout::PML4), layout::PDPT | 3);
        assert_eq!(at(layout::PDPT), layout::PAGE_DIRECTORY | 3);
        assert_eq!(at(layout::PAGE_DIRECTORY + 511 * 8), 511 << 21 | 0x83);
    }

    #[test]
    fn segments_are_what_the_boot_protocol_wants() {
        let code = segment(CODE);
        assert_eq!((code.type_, code.s, code.l, code.db, code.g, code.present), (0xb, 1, 1, 0, 1, 1));
        let data = segment(DATA);
        assert_eq!((data.type_, data.s, data.l, data.db, data.g, data.present), (0x3, 1, 0, 1, 1, 1));
    }
}
