//! Drives the real `sealci-init` over a socket pair, as an agent does, and as no agent would.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod ending;
mod host;
mod put;
mod running;
mod take;
