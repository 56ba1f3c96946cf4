//! Boots real guests with the real `sealci-vmm`, on whatever `/dev/kvm` a guest gets through with.
//!
//! `cargo xtask vm-test` runs it where there is one: within a QEMU guest. Elsewhere it says that it is skipped, and why.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod boot;
mod cost;
mod devices;
mod ending;
mod initramfs;
mod jail;
mod lab;
mod refusals;
