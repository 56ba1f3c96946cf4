//! Obtains real images, from Debian's own registry server, from folders and files, and hostile ones made by hand.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod lab;
mod registry;
