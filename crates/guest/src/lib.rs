//! Defines what an agent and the init of an environment say to each other, and what both of them know of an image's users.
//!
//! Absent here: unsafe code, I/O, and any dependency. The init itself is this package's binary.

#![forbid(unsafe_code)]

pub mod accounts;
pub mod wire;
