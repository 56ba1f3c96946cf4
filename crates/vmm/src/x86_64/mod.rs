//! Everything that only an x86-64 guest has: its tables and registers before its first instruction, and what a snapshot keeps of
//! them.
//!
//! ```text
//!   0x0500 descriptor table      0x7000 zero page       0x9000 page tables     0x20000 command line
//!   0xe0000 ACPI tables          1 MiB  kernel ───▶     ◀─── initial RAM disk at the end of the low memory
//!   3 GiB   devices ─────────────────────────────────── 0xfec00000 I/O APIC ── 0xfee00000 local APICs ── 4 GiB
//! ```

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod registers;
pub mod state;
