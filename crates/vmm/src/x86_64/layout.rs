//! Says where in the guest's addresses, ports and interrupts everything lies.

/// The global descriptor table that the kernel is started with.
pub const GDT: u64 = 0x500;
/// The kernel's boot parameters.
pub const ZERO_PAGE: u64 = 0x7000;
/// The three levels of page tables that the kernel is started with.
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// A stack, which 64-bit kernels replace at once.
pub const STACK_TOP: u64 = 0x8ff0;
pub const COMMAND_LINE: u64 = 0x2_0000;
/// With the byte that ends it; far more than the kernel's own bound.
pub const COMMAND_LINE_BYTES: usize = 0x1_0000;

/// The end of what a PC's firmware leaves free below 1 MiB.
pub const LOW_END: u64 = 0x9_fc00;
/// Where Linux looks for ACPI's first table by itself.
pub const ACPI_BEGIN: u64 = 0xe_0000;
pub const ACPI_END: u64 = 0x10_0000;
/// Where kernels and all else may lie.
pub const HIGH_BEGIN: u64 = 0x10_0000;

/// The registers of virtio devices, a page for each.
pub const DEVICES: u64 = 0xd000_0000;
pub const DEVICE_BYTES: u64 = 0x1000;
/// The first device's interrupt; each has its own.
pub const DEVICES_INTERRUPT: u32 = 5;
/// As many as the I/O APIC has pins for.
pub const MAX_DEVICES: usize = 19;

/// Pages that KVM needs on Intel's processors.
pub const TSS: u64 = 0xfffb_d000;
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// The first serial line.
pub const COM1: u64 = 0x3f8;
pub const COM1_PORTS: u64 = 8;
pub const COM1_INTERRUPT: u32 = 4;
/// Where ACPI turns the machine off; the next port tells its state.
pub const SLEEP_CONTROL: u16 = 0x600;
pub const SLEEP_STATUS: u16 = 0x601;
