//! Runs one Linux guest behind hardware virtualization (KVM).
//!
//! ```text
//!  kernel ──▶ memory ◀── x86_64: tables, parameters, registers
//!                │
//!  machine ──▶ vcpu (a thread each) ── bus ──▶ virtio, serial
//!          └─▶ devices (one thread for all) ──────▲
//! ```
//!
//! It knows nothing of what the guest is for. Invariants: nothing that the guest writes makes this process panic, wait
//! without bound or touch other memory than the guest's; what is of x86-64 stands in `x86_64` and in the kernel's formats.

pub mod bus;
mod devices;
pub mod jail;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod serial;
mod vcpu;
pub mod virtio;
pub mod x86_64;
