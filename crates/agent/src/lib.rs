//! Runs actions on this machine for an installation of SealCI.

pub mod executor;
pub mod identity;
pub mod spool;
