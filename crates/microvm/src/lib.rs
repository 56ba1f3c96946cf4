//! Makes what a microVM is started with out of what a host has: an image's root file system, a disk to write to, a kernel with
//! the modules that are needed, and the initial RAM disk that brings them together; and keeps machines that were saved. Knows
//! nothing of CI.
//!
//! ```text
//! image's layers ──▶ root: one squashfs per digest ─────────────────────────┐
//! /boot, /lib/modules ──▶ kernel: image, modules in load order ──▶ initramfs ─┴─▶ who starts the machine
//!                                              sealci-init ─────────┘
//! ```

pub mod initramfs;
pub mod kernel;
pub mod root;
pub mod scratch;
mod shelf;
pub mod template;
