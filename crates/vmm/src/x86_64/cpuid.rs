//! Says what each virtual CPU tells of itself: what the host's has and KVM can give, and its place among the others.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Feature bits of leaf 1, ECX.
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Of leaf 1, EDX: one package has several.
const HYPER_THREADING: u32 = 1 << 28;
/// Kinds of levels in the leaves of topology.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Adapts what KVM supports to virtual CPU `index` of `count`: one thread a core, all cores in one package.
pub fn adapt(supported: &mut CpuId, index: u8, count: u8) {
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
        let entry =
            kvm_cpuid_entry2 { function, index: index_of_leaf, ebx: 0x0100_1234, ..Default::default() };
        let mut id = CpuId::from_entries(&[entry]).unwrap();
        adapt(&mut id, index, count);
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
}
