//! Takes a machine's processors, interrupt controllers and clock apart into what a snapshot keeps, and puts them together again.
//!
//! KVM's calls change what others read, so their order is not free (after Documentation/virt/kvm/api.rst, and what KVM does):
//!
//! - The state of running comes first out: asking for it takes pending wake-ups in. Events come last: other calls settle them.
//! - The local APIC comes in before the registers by number, since only with its timer in the mode of deadlines one can be set;
//!   the time-stamp counter before the deadline, which is of its scale.
//!
//! Invariant: no interrupt is lost. A deadline that has just passed reads as none, and is kept as one that passes at once.

use std::{fmt, mem};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::errno::Error as Errno;

use crate::machine::MAX_VCPUS;
use crate::snapshot::fields::{Fields, Malformed, Plain, Writer};

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;

/// The two controllers of a PC, and the I/O APIC.
const CHIPS: u32 = 3;
/// What two calibrations of one processor's clock may differ by: one in so many.
const CLOCK_TOLERANCE: u32 = 4000;

/// Why a state is not had, or not gone on from.
#[derive(Debug, Error)]
pub enum StateError {
    #[error("KVM does not give {what}")]
    Read { what: &'static str, source: Errno },
    #[error("KVM does not take {what}")]
    Write { what: &'static str, source: Errno },
    #[error("KVM does not take the register {index:#x}")]
    Register { index: u32 },
    #[error(
        "the snapshot was taken on another processor or kernel ({what} differs): take it anew on this one"
    )]
    Foreign { what: String },
}

/// What of all this a snapshot keeps.
#[derive(Clone, Default)]
pub struct ProcessorsState {
    /// What the first virtual CPU was told to tell of itself.
    id: Vec<kvm_cpuid_entry2>,
    clock_khz: u32,
    /// KVM's own clock, in nanoseconds.
    clock: u64,
    chips: Vec<kvm_irqchip>,
    vcpus: Vec<VcpuState>,
}

#[derive(Debug, Clone, Default)]
struct VcpuState {
    running: kvm_mp_state,
    registers: kvm_regs,
    system: kvm_sregs,
    extended: Extended,
    control: kvm_xcrs,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    by_number: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// The floating-point and vector registers, as `XSAVE` writes them.
#[derive(Debug, Clone)]
#[repr(transparent)]
struct Extended([u32; 1024]);

impl Default for Extended {
    fn default() -> Self {
        Self([0; 1024])
    }
}

// SAFETY: KVM's structures name their padding, and are integers through and through.
unsafe impl Plain for kvm_cpuid_entry2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_irqchip {}
// SAFETY: as above.
unsafe impl Plain for kvm_mp_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs {}
// SAFETY: as above.
unsafe impl Plain for Extended {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_msr_entry {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}

impl fmt::Debug for ProcessorsState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessorsState").field("vcpus", &self.vcpus.len()).finish_non_exhaustive()
    }
}

impl ProcessorsState {
    /// Takes it from virtual CPUs that are out of the guest, with nothing half done. They do not go on afterwards.
    /// `id` is what the first of them was told to tell of itself: what it tells now depends on what its guest has turned on.
    pub fn take(kvm: &Kvm, vm: &VmFd, vcpus: &[VcpuFd], id: &CpuId) -> Result<Self, StateError> {
        let read = |what| move |source| StateError::Read { what, source };
        let numbers = kvm.get_msr_index_list().map_err(read("its list of registers"))?;
        let mut state = Self { id: id.as_slice().to_vec(), ..Self::default() };
        for vcpu in vcpus {
            state.vcpus.push(VcpuState::take(vcpu, numbers.as_slice())?);
        }
        if let Some(first) = vcpus.first() {
            state.clock_khz = first.get_tsc_khz().map_err(read("its clock's frequency"))?;
        }
        for chip_id in 0..CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(read("an interrupt controller"))?;
            state.chips.push(chip);
        }
        state.clock = vm.get_clock().map_err(read("its clock"))?.clock;
        // Last of all: it writes.
        for (vcpu, state) in vcpus.iter().zip(&mut state.vcpus) {
            state.keep_what_can_be_written(vcpu)?;
        }
        Ok(state)
    }

    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// Whether this host's processor is what the guest has found; `id` is what KVM gives a first virtual CPU here.
    pub fn check(&self, id: &CpuId) -> Result<(), StateError> {
        let foreign = |what: String| Err(StateError::Foreign { what });
        let here = id.as_slice();
        let differs = |(kept, here): &(&kvm_cpuid_entry2, &kvm_cpuid_entry2)| kept != here;
        if let Some((kept, _)) = self.id.iter().zip(here).find(differs) {
            return foreign(format!("what it tells of itself in leaf {:#x}.{}", kept.function, kept.index));
        }
        if self.id.len() != here.len() {
            return foreign("how much it tells of itself".to_owned());
        }
        Ok(())
    }

    /// Puts it into virtual CPUs that were just made and described, and into their machine.
    pub fn give(&self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<(), StateError> {
        let write = |what| move |source| StateError::Write { what, source };
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            let khz = vcpu
                .get_tsc_khz()
                .map_err(|source| StateError::Read { what: "its clock's frequency", source })?;
            if khz.abs_diff(self.clock_khz) > self.clock_khz / CLOCK_TOLERANCE {
                return Err(StateError::Foreign { what: "its clock's frequency".to_owned() });
            }
            state.give(vcpu)?;
        }
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(write("an interrupt controller"))?;
        }
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(write("its clock"))
    }

    pub(crate) fn encode(&self, to: &mut Writer) {
        to.list(&self.id);
        to.u32(self.clock_khz);
        to.u64(self.clock);
        to.list(&self.chips);
        to.count(self.vcpus.len());
        for vcpu in &self.vcpus {
            vcpu.encode(to);
        }
    }

    pub(crate) fn decode(from: &mut Fields<'_>) -> Result<Self, Malformed> {
        let id = from.list(KVM_MAX_CPUID_ENTRIES, "processor")?;
        let (clock_khz, clock) = (from.u32("frequency")?, from.u64("clock")?);
        let chips: Vec<kvm_irqchip> = from.list(CHIPS as usize, "interrupt controllers")?;
        // Each once: KVM puts what it is given where its number says.
        if !chips.iter().map(|chip| chip.chip_id).eq(0..CHIPS) {
            return Err(Malformed { field: "interrupt controllers" });
        }
        let count = from.count(MAX_VCPUS.into(), "virtual CPUs")?;
        if count == 0 {
            return Err(Malformed { field: "virtual CPUs" });
        }
        let mut vcpus = Vec::new();
        for _ in 0..count {
            vcpus.push(VcpuState::decode(from)?);
        }
        Ok(Self { id, clock_khz, clock, chips, vcpus })
    }
}

impl VcpuState {
    fn take(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Self, StateError> {
        let read = |what| move |source| StateError::Read { what, source };
        Ok(Self {
            running: vcpu.get_mp_state().map_err(read("whether a virtual CPU runs"))?,
            registers: vcpu.get_regs().map_err(read("registers"))?,
            system: vcpu.get_sregs().map_err(read("system registers"))?,
            extended: Extended(vcpu.get_xsave().map_err(read("vector registers"))?.region),
            control: vcpu.get_xcrs().map_err(read("extended control registers"))?,
            debug: vcpu.get_debug_regs().map_err(read("debug registers"))?,
            apic: vcpu.get_lapic().map_err(read("a local APIC"))?,
            by_number: registers_by_number(vcpu, numbers)?,
            events: vcpu.get_vcpu_events().map_err(read("a virtual CPU's events"))?,
        })
    }

    /// Constants can be read and not be written, and each virtual CPU has them anyway.
    fn keep_what_can_be_written(&mut self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let mut left = mem::take(&mut self.by_number);
        while !left.is_empty() {
            let taken = write(vcpu, &left)?;
            let rest = left.split_off(taken);
            self.by_number.append(&mut left);
            left = rest.into_iter().skip(1).collect();
        }
        Ok(())
    }

    fn give(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let cannot = |what| move |source| StateError::Write { what, source };
        vcpu.set_mp_state(self.running).map_err(cannot("whether a virtual CPU runs"))?;
        vcpu.set_regs(&self.registers).map_err(cannot("registers"))?;
        vcpu.set_sregs(&self.system).map_err(cannot("system registers"))?;
        let extended = kvm_xsave { region: self.extended.0, ..Default::default() };
        // SAFETY: more than these 4 KiB are read only where the process has asked for larger registers, which this one never
        // does.
        unsafe { vcpu.set_xsave(&extended) }.map_err(cannot("vector registers"))?;
        vcpu.set_xcrs(&self.control).map_err(cannot("extended control registers"))?;
        vcpu.set_debug_regs(&self.debug).map_err(cannot("debug registers"))?;
        vcpu.set_lapic(&self.apic).map_err(cannot("a local APIC"))?;
        let taken = write(vcpu, &self.by_number)?;
        if let Some(refused) = self.by_number.get(taken) {
            return Err(StateError::Register { index: refused.index });
        }
        vcpu.set_vcpu_events(&self.events).map_err(cannot("a virtual CPU's events"))
    }

    fn encode(&self, to: &mut Writer) {
        to.plain(&self.running);
        to.plain(&self.registers);
        to.plain(&self.system);
        to.plain(&self.extended);
        to.plain(&self.control);
        to.plain(&self.debug);
        to.plain(&self.apic);
        to.list(&self.by_number);
        to.plain(&self.events);
    }

    fn decode(from: &mut Fields<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            running: from.plain("state of running")?,
            registers: from.plain("registers")?,
            system: from.plain("system registers")?,
            extended: from.plain("vector registers")?,
            control: from.plain("extended control registers")?,
            debug: from.plain("debug registers")?,
            apic: from.plain("local APIC")?,
            by_number: from.list(KVM_MAX_MSR_ENTRIES, "registers by number")?,
            events: from.plain("events")?,
        })
    }
}

/// All that can be read, in the order in which they can be written.
fn registers_by_number(vcpu: &VcpuFd, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut left: Vec<_> =
        numbers.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    left.sort_by_key(|entry| match entry.index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut all = Vec::new();
    while !left.is_empty() {
        let mut list = list_of(&left)?;
        let count = vcpu
            .get_msrs(&mut list)
            .map_err(|source| StateError::Read { what: "registers by number", source })?;
        all.extend_from_slice(&list.as_slice()[..count.min(left.len())]);
        // The one that it stopped at cannot be read.
        left.drain(..left.len().min(count + 1));
    }
    arm_what_has_passed(&mut all);
    Ok(all)
}

fn arm_what_has_passed(all: &mut [kvm_msr_entry]) {
    let now = all.iter().find(|entry| entry.index == TSC).map_or(1, |entry| entry.data);
    for entry in all.iter_mut().filter(|entry| entry.index == TSC_DEADLINE && entry.data == 0) {
        entry.data = now;
    }
}

/// How many of them were taken: all up to the first that is refused.
fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<usize, StateError> {
    vcpu.set_msrs(&list_of(entries)?)
        .map_err(|source| StateError::Write { what: "registers by number", source })
}

fn list_of(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    let too_many = |_| StateError::Read { what: "so many registers", source: Errno::new(libc::E2BIG) };
    Msrs::from_entries(entries).map_err(too_many)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_has_passed_passes_at_once() {
        let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let mut all = [entry(TSC, 77), entry(0x174, 0), entry(TSC_DEADLINE, 0)];
        arm_what_has_passed(&mut all);
        assert_eq!(all.map(|entry| entry.data), [77, 0, 77]);
        let mut all = [entry(TSC, 77), entry(TSC_DEADLINE, 99)];
        arm_what_has_passed(&mut all);
        assert_eq!(all[1].data, 99);
    }

    #[test]
    fn another_processor_is_refused_by_what_differs() {
        let entry = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let state = ProcessorsState { id: vec![entry(0, 1), entry(7, 2)], ..Default::default() };
        let check = |entries: &[kvm_cpuid_entry2]| {
            state.check(&CpuId::from_entries(entries).unwrap()).map_err(|error| error.to_string())
        };
        check(&[entry(0, 1), entry(7, 2)]).unwrap();
        let error = check(&[entry(0, 1), entry(7, 3)]).unwrap_err();
        assert!(error.contains("leaf 0x7.0") && error.contains("take it anew"), "{error}");
        assert!(check(&[entry(0, 1)]).unwrap_err().contains("how much"));
    }
}
