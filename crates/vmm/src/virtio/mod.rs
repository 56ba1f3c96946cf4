//! Models virtio devices over a guest's memory: what a driver says in registers and queues comes in, and answers go out.
//!
//! ```text
//!   vCPU thread   register accesses ──▶ mmio::Transport ◀── run(Cause)   the devices' one thread
//!                                          │    ▲
//!                                          ▼    │ Queues: chains of the guest's buffers
//!                                         Device
//! ```
//!
//! Nothing here knows the hypervisor, so all of it is tested and fuzzed on any machine: interrupts leave by [`Interrupt`], and
//! that a queue was notified, or a descriptor is ready, comes in as a [`Cause`].
//!
//! Invariants: a guest is a stranger, so every number it gives is checked before it is used; what the rings and registers
//! cannot mean makes the device [`Broken`] until it is reset, and what a request cannot mean is answered as that device's
//! protocol says; nothing is allocated by a guest's word beyond a fixed bound; one call does a bounded amount of work.

pub mod balloon;
pub mod block;
pub mod entropy;
pub mod mmio;
pub mod net;
mod queue;
mod sys;
pub mod vsock;

#[cfg(test)]
pub(crate) mod driver;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use thiserror::Error;

pub use queue::{Broken, Buffers, Chain, Queues};

/// What a device is (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    Net = 1,
    Block = 2,
    Entropy = 4,
    Balloon = 5,
    Vsock = 19,
}

/// Why a device has to look at its queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The driver has notified the queue of this index, or there was more in it than one call does.
    Queue(usize),
    /// The descriptor that the device has watched is ready, or there was more to do than one call does.
    Ready,
}

/// One device. All of its methods are called one at a time, under its transport's lock.
pub trait Device: Send {
    fn kind(&self) -> Kind;

    /// What it offers beyond what the transport does for all.
    fn features(&self) -> u64 {
        0
    }

    /// How many entries each of its queues may have: powers of two, at most 64 queues.
    fn queue_sizes(&self) -> &'static [u16];

    /// Its configuration as the driver reads it.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// The driver writes within the configuration.
    fn write_config(&mut self, _offset: usize, _bytes: &[u8]) {}

    /// The driver is ready, and has accepted these features. Not every queue has to be in use.
    fn activate(&mut self, _features: u64) {}

    /// A descriptor to be watched for reading, from now until the end: whoever watches many makes them one by an epoll.
    fn watched(&self) -> Option<Arc<OwnedFd>> {
        None
    }

    /// The watched descriptor is ready. Takes note of it, so that it is not ready any more; called also while no driver is.
    fn ready(&mut self) {}

    /// Does what there is to do. Called only while the driver is ready.
    fn serve(&mut self, cause: Cause, queues: &mut Queues<'_>) -> Result<(), Broken>;

    /// Forgets its driver and everything done for it.
    fn reset(&mut self);

    /// What a snapshot keeps of it beside its transport's state.
    fn state(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Its transport goes on from a snapshot, which has kept this of one of its kind; after `activate`, if the driver was ready
    /// then.
    fn restore(&mut self, _state: &[u8]) -> Result<(), Unlike> {
        Ok(())
    }
}

/// A guest cannot go on with this device: it is not like the one that it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Unlike(pub &'static str);

/// A device's interrupt line, which is edge-triggered.
pub trait Interrupt: Send + Sync {
    fn signal(&self);
}

/// Offered for every device (virtio 1.2, section 6): the ring's extensions, and that this is no legacy device.
const FEATURE_INDIRECT: u64 = 1 << 28;
const FEATURE_EVENT_IDX: u64 = 1 << 29;
const FEATURE_VERSION_1: u64 = 1 << 32;
