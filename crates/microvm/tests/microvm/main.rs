//! Makes roots of images that a real store unpacked, initial RAM disks and scratch disks, and finds kernels; holds them against what other programs
//! read in them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod initramfs;
mod kernels;
mod lab;
mod roots;
mod scratch;
