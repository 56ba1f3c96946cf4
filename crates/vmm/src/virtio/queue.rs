//! Takes chains of buffers out of a guest's queues, and gives them back used.
//!
//! A chain is read from the guest's memory once: what it says is checked then, and kept. The bytes in its buffers stay the
//! guest's, which may change them at any time; whoever decides by them copies them first.

use std::collections::VecDeque;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use crate::memory::GuestMemory;

/// What a driver cannot mean: its device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Broken {
    #[error("a register was written that takes no such value, or not now")]
    OutOfOrder,
    #[error("a ring is outside of memory, or says more than it holds")]
    Ring,
    #[error("a chain of buffers does not end, or is longer than its queue")]
    Chain,
    #[error("a buffer is outside of memory")]
    Buffer,
    #[error("a buffer to read follows one to write")]
    Direction,
    #[error("a request lacks what every request has")]
    Request,
}

/// How many chains one call takes at most, so that no guest keeps the devices' thread for itself.
const MOST_CHAINS: u32 = 1024;

/// A device's queues, while it serves them.
pub struct Queues<'m> {
    memory: &'m GuestMemory,
    queues: &'m mut [Queue],
    chains_left: u32,
    /// One bit for each queue in which something became used.
    used: u64,
    config_changed: bool,
}

impl<'m> Queues<'m> {
    pub(super) fn new(memory: &'m GuestMemory, queues: &'m mut [Queue]) -> Self {
        Self { memory, queues, chains_left: MOST_CHAINS, used: 0, config_changed: false }
    }

    /// The next chain of this queue. With none the driver was asked to notify of the next one; a queue that is not in use
    /// has none.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain<'m>>, Broken> {
        let memory = self.memory;
        if self.chains_left == 0 {
            return Ok(None);
        }
        let Some(queue) = self.queues.get_mut(queue).filter(|queue| queue.ready()) else { return Ok(None) };
        // Once more for a chain that came just before its notification was asked for.
        for _ in 0..2 {
            let next = queue.iter(memory).map_err(|_| Broken::Ring)?.next();
            if let Some(descriptors) = next {
                self.chains_left -= 1;
                return Chain::read(memory, descriptors, queue.size()).map(Some);
            }
            if !queue.enable_notification(memory).map_err(|_| Broken::Ring)? {
                return Ok(None);
            }
        }
        // What was there a moment ago has been taken back.
        Err(Broken::Ring)
    }

    /// Has the last chain that was popped be the next one again.
    pub fn put_back(&mut self, queue: usize) {
        if let Some(queue) = self.queues.get_mut(queue) {
            queue.go_to_previous_position();
        }
    }

    /// Gives a chain back to the driver, with so many bytes written into it.
    pub fn push(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Broken> {
        let Some(ring) = self.queues.get_mut(queue) else { return Err(Broken::Ring) };
        ring.add_used(self.memory, head, written).map_err(|_| Broken::Ring)?;
        self.used |= 1 << queue;
        Ok(())
    }

    /// The driver has to read the configuration anew.
    pub fn config_changed(&mut self) {
        self.config_changed = true;
    }

    /// Whether there may be more to do than this call did.
    pub(super) fn has_more(&self) -> bool {
        self.chains_left == 0
    }

    pub(super) fn has_new_config(&self) -> bool {
        self.config_changed
    }

    /// Whether the driver wants to be told of what became used.
    pub(super) fn needs_interrupt(&mut self) -> Result<bool, Broken> {
        let mut needs = false;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if self.used & 1 << index != 0 {
                needs |= queue.needs_notification(self.memory).map_err(|_| Broken::Ring)?;
            }
        }
        Ok(needs)
    }
}

/// One chain: what the device reads, then what it writes.
pub struct Chain<'m> {
    pub head: u16,
    pub readable: Buffers<'m>,
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    fn read(
        memory: &'m GuestMemory,
        descriptors: DescriptorChain<&'m GuestMemory>,
        longest: u16,
    ) -> Result<Self, Broken> {
        let mut chain = Self {
            head: descriptors.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let (mut length, mut writes, mut ended) = (0, false, false);
        // It ends early at whatever it cannot follow, and never yields more than 4 GiB.
        for descriptor in descriptors {
            length += 1;
            if length > longest {
                return Err(Broken::Chain);
            }
            if writes && !descriptor.is_write_only() {
                return Err(Broken::Direction);
            }
            writes |= descriptor.is_write_only();
            let (buffers, access) = match writes {
                true => (&mut chain.writable, Permissions::Write),
                false => (&mut chain.readable, Permissions::Read),
            };
            buffers.add(memory, descriptor.addr(), descriptor.len(), access)?;
            ended = !descriptor.has_next();
        }
        if ended { Ok(chain) } else { Err(Broken::Chain) }
    }
}

/// Pieces of the guest's memory, taken from the front.
#[derive(Default)]
pub struct Buffers<'m> {
    slices: VecDeque<VolatileSlice<'m>>,
    bytes: usize,
}

impl<'m> Buffers<'m> {
    fn add(
        &mut self,
        memory: &'m GuestMemory,
        address: GuestAddress,
        bytes: u32,
        access: Permissions,
    ) -> Result<(), Broken> {
        let bytes = bytes as usize;
        if !memory.check_range(address, bytes, access) {
            return Err(Broken::Buffer);
        }
        for slice in memory.get_slices(address, bytes, access).map_err(|_| Broken::Buffer)? {
            let slice = slice.map_err(|_| Broken::Buffer)?;
            self.bytes += slice.len();
            self.slices.push_back(slice);
        }
        Ok(())
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn slices(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.slices.iter()
    }

    /// Takes the first bytes off, or all if there are fewer.
    pub fn split_front(&mut self, bytes: usize) -> Self {
        let mut front = Self::default();
        while front.bytes < bytes {
            let Some(slice) = self.slices.pop_front() else { break };
            self.bytes -= slice.len();
            let wanted = bytes - front.bytes;
            let taken = match slice.split_at(wanted.min(slice.len())) {
                Ok((taken, rest)) => {
                    if !rest.is_empty() {
                        self.bytes += rest.len();
                        self.slices.push_front(rest);
                    }
                    taken
                }
                Err(_) => slice,
            };
            front.bytes += taken.len();
            front.slices.push_back(taken);
        }
        front
    }

    /// Takes the last bytes off, or all if there are fewer.
    pub fn split_back(&mut self, bytes: usize) -> Self {
        let front = self.split_front(self.bytes.saturating_sub(bytes));
        std::mem::replace(self, front)
    }

    /// Copies the first bytes out of the guest; how many there were.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let front = self.split_front(into.len());
        let mut done = 0;
        for slice in front.slices() {
            done += slice.copy_to(&mut into[done..]);
        }
        done
    }

    /// The first bytes, if there are so many.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.read(&mut bytes) == N).then_some(bytes)
    }

    /// Copies into the guest as much as there is room for; how much that was.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let front = self.split_front(from.len());
        let mut done = 0;
        for slice in front.slices() {
            let end = done + slice.len();
            slice.copy_from(&from[done..end]);
            done = end;
        }
        done
    }

    /// Fills all with zeros.
    pub fn write_zeros(&mut self) {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.bytes > 0 {
            self.write(&ZEROS[..ZEROS.len().min(self.bytes)]);
        }
    }
}
