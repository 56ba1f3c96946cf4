//! Says what each virtual CPU tells of itself: what the host's has and KVM can give, and its place among the others.

use std::arch::x86_64::__cpuid;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Feature bits of leaf 1, ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Of leaf 1, EDX: one package has several.
const HYPER_THREADING: u32 = 1 << 28;
/// Kinds of levels in the leaves of topology.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;
/// What KVM offers beside a processor (Documentation/virt/kvm/x86/cpuid.rst), EAX: the end of an interrupt without an exit.
const KVM_FEATURES: u32 = 0x4000_0001;
const PV_EOI: u32 = 1 << 6;
/// Who this machine's hypervisor is, EBX, ECX and EDX.
const HYPERVISOR_NAME: u32 = 0x4000_0000;
const QEMU_EMULATION: [u8; 12] = *b"TCGTCGTCGTCG";

/// What runs the virtual CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    Real,
    /// QEMU's emulation of one. It may deliver an interrupt that KVM injects a second time, also where the guest has turned
    /// interrupts off by then: its `helper_vmrun` leaves the vector in `exception_index`, and whatever makes the emulation leave
    /// its loop before the guest's next exit takes that for a new one (seen with 7.2; newer ones have the same code). A kernel
    /// that is interrupted so under a lock that the interrupt takes, too, stands still for ever. Where the end of each
    /// interrupt is an exit, that exit comes before any lock.
    Emulated,
}

impl Processor {
    /// Of this machine.
    pub fn beneath() -> Self {
        let name = __cpuid(HYPERVISOR_NAME);
        let name = [name.ebx, name.ecx, name.edx].map(u32::to_le_bytes);
        let is_virtual = __cpuid(1).ecx & HYPERVISOR != 0;
        if is_virtual && name.as_flattened() == QEMU_EMULATION { Self::Emulated } else { Self::Real }
    }
}

/// Adapts what KVM supports to virtual CPU `index` of `count`: one thread a core, all cores in one package.
pub fn adapt(supported: &mut CpuId, index: u8, count: u8, processor: Processor) {
    let width = u32::from(count).next_power_of_two().trailing_zeros();
    for entry in supported.as_mut_slice() {
        match entry.function {
            0x1 => {
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.edx |= if count > 1 { HYPER_THREADING } else { 0 };
                entry.ebx = entry.ebx & 0xffff | u32::from(count) << 16 | u32::from(index) << 24;
            }
            // Intel's caches: how many share them, and how many cores there are.
            0x4 if entry.eax & 0x1f != 0 => {
                let is_shared = entry.eax >> 5 & 0x7 >= 3;
                let sharing = if is_shared { u32::from(count) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | (u32::from(count) - 1) << 26;
            }
            0xb | 0x1f => topology(entry, u32::from(index), u32::from(count), width),
            0x8000_0008 => entry.ecx = (u32::from(count) - 1) | width << 12,
            // AMD's cache of the third level is everybody's, the others one core's.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let is_shared = entry.eax >> 5 & 0x7 >= 3;
                let sharing = if is_shared { u32::from(count) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            0x8000_001e => {
                entry.eax = u32::from(index);
                entry.ebx = u32::from(index);
                entry.ecx = 0;
            }
            KVM_FEATURES if processor == Processor::Emulated => entry.eax &= !PV_EOI,
            _ => {}
        }
    }
}

fn topology(entry: &mut kvm_cpuid_entry2, index: u32, count: u32, width: u32) {
    let (shift, processors, level) = match entry.index {
        0 => (0, 1, LEVEL_THREAD),
        1 => (width, count, LEVEL_CORE),
        _ => (0, 0, 0),
    };
    (entry.eax, entry.ebx) = (shift, processors);
    entry.ecx = entry.index | level;
    entry.edx = index;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, index_of_leaf: u32, index: u8, count: u8) -> kvm_cpuid_entry2 {
        adapted_on(Processor::Real, function, index_of_leaf, index, count)
    }

    fn adapted_on(
        processor: Processor,
        function: u32,
        index_of_leaf: u32,
        index: u8,
        count: u8,
    ) -> kvm_cpuid_entry2 {
        let entry = kvm_cpuid_entry2 {
            function,
            index: index_of_leaf,
            eax: 0x63,
            ebx: 0x0100_1234,
            ..Default::default()
        };
        let mut id = CpuId::from_entries(&[entry]).unwrap();
        adapt(&mut id, index, count, processor);
        id.as_slice()[0]
    }

    #[test]
    fn each_has_its_own_number() {
        let first = adapted(1, 0, 3, 4);
        assert_eq!(first.ebx, 0x0304_1234);
        assert_ne!(first.ecx & HYPERVISOR, 0);
        assert_eq!(adapted(0xb, 0, 3, 4).edx, 3);
        assert_eq!(adapted(0x8000_001e, 0, 3, 4).eax, 3);
    }

    #[test]
    fn all_are_cores_of_one_package() {
        let (thread, core) = (adapted(0xb, 0, 0, 3), adapted(0xb, 1, 0, 3));
        assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
        assert_eq!((core.eax, core.ebx, core.ecx), (2, 3, 0x201));
        assert_eq!(adapted(0xb, 2, 0, 3).ebx, 0);
        assert_eq!(adapted(0x8000_0008, 0, 0, 3).ecx, 0x2002);
        assert_eq!(adapted(1, 0, 0, 1).edx, 0);
    }
    #[test]
    fn each_interrupt_ends_with_an_exit_where_the_processor_is_emulated() {
        let features = |processor| adapted_on(processor, KVM_FEATURES, 0, 0, 1).eax;
        assert_eq!((features(Processor::Real), features(Processor::Emulated)), (0x63, 0x23));
    }
}
