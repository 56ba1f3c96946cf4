//! Runs one Linux guest behind hardware virtualization (KVM).
//!
//! It knows nothing of what the guest is for.

pub mod memory;
pub mod virtio;
