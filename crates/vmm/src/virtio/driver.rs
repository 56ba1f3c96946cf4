//! Plays a driver, in tests: sets a device up by its registers, and fills its queues as a guest's kernel does, or as none would.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{Bytes as _, GuestAddress};

use super::mmio::Transport;
use super::{Cause, Device, Interrupt};
use crate::memory::GuestMemory;

pub const MEMORY_BYTES: usize = 1 << 20;
pub const QUEUE_SIZE: u16 = 16;
/// From here on the memory is no queue's.
pub const DATA: u64 = 0x1_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const VERSION_1: u64 = 1 << 32;

/// Counts what is signalled.
#[derive(Default)]
pub struct Count(AtomicUsize);

impl Count {
    /// How many came since this was asked last.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl Interrupt for Count {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A part of a chain.
#[derive(Clone, Copy)]
pub enum Part<'a> {
    /// The device reads these.
    Read(&'a [u8]),
    /// The device writes so many bytes here.
    Write(u64, u32),
}

#[derive(Default, Clone, Copy)]
struct Filled {
    next_descriptor: u16,
    offered: u16,
    seen: u16,
}

pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

pub struct Driver {
    pub memory: GuestMemory,
    pub transport: Transport,
    interrupts: Arc<Count>,
    filled: Vec<Filled>,
    next_data: u64,
}

impl Driver {
    pub fn new(device: impl Device + 'static) -> Self {
        Self::over(memory(), device)
    }

    pub fn over(memory: GuestMemory, device: impl Device + 'static) -> Self {
        Self::boxed(memory, Box::new(device))
    }

    fn boxed(memory: GuestMemory, device: Box<dyn Device>) -> Self {
        let interrupts = Arc::new(Count::default());
        let transport = Transport::new(device, memory.clone(), interrupts.clone());
        let filled = vec![Filled::default(); transport.queue_count()];
        Self { memory, transport, interrupts, filled, next_data: DATA + 0x8_0000 }
    }

    /// One whose driver is ready, with these features beyond VERSION_1.
    pub fn started(device: impl Device + 'static, features: u64) -> Self {
        let driver = Self::new(device);
        driver.start(features);
        driver
    }

    pub fn started_boxed(device: Box<dyn Device>) -> Self {
        let driver = Self::boxed(memory(), device);
        driver.start(0);
        driver
    }

    pub fn start(&self, features: u64) {
        self.negotiate(features | VERSION_1);
        for queue in 0..self.transport.queue_count() {
            self.place(queue, QUEUE_SIZE);
        }
        self.set(0x70, 15);
        assert_eq!(self.get(0x70), 15);
    }

    pub fn get(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn config(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0xaa; bytes];
        self.transport.read(0x100 + offset, &mut data);
        data
    }

    pub fn negotiate(&self, features: u64) {
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        for half in [0, 1] {
            self.set(0x24, half);
            self.set(0x20, (features >> (32 * half)) as u32);
        }
        self.set(0x70, 11);
    }

    fn base(queue: usize) -> u64 {
        0x1000 * (queue as u64 + 1)
    }

    pub fn available(queue: usize) -> u64 {
        Self::base(queue) + 0x400
    }

    pub fn used_ring(queue: usize) -> u64 {
        Self::base(queue) + 0x800
    }

    pub fn place(&self, queue: usize, size: u16) {
        self.set(0x30, queue as u32);
        self.set(0x38, size.into());
        for (register, address) in
            [(0x80, Self::base(queue)), (0x90, Self::available(queue)), (0xa0, Self::used_ring(queue))]
        {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    pub fn descriptor(&self, queue: usize, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        self.describe(Self::base(queue), index, address, bytes, flags, next);
    }

    /// In a table at any place.
    pub fn describe(&self, table: u64, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let at = GuestAddress(table + 16 * u64::from(index));
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&address.to_le_bytes());
        descriptor[8..12].copy_from_slice(&bytes.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&descriptor, at).unwrap();
    }

    /// Puts a chain's head in the ring of what is available.
    pub fn offer_head(&mut self, queue: usize, head: u16) {
        let filled = &mut self.filled[queue];
        let slot = Self::available(queue) + 4 + 2 * u64::from(filled.offered % QUEUE_SIZE);
        filled.offered = filled.offered.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.memory.write_obj(filled.offered, GuestAddress(Self::available(queue) + 2)).unwrap();
    }

    /// Offers a chain, and says which one it is.
    pub fn offer(&mut self, queue: usize, parts: &[Part<'_>]) -> u16 {
        let first = self.filled[queue].next_descriptor;
        for (count, part) in (0u16..).zip(parts) {
            let index = (first + count) % QUEUE_SIZE;
            let (address, bytes, flags) = match *part {
                Part::Read(bytes) => (self.data(bytes), bytes.len() as u32, 0),
                Part::Write(address, bytes) => (address, bytes, WRITE),
            };
            let is_last = usize::from(count) + 1 == parts.len();
            let flags = flags | if is_last { 0 } else { NEXT };
            self.descriptor(queue, index, address, bytes, flags, (index + 1) % QUEUE_SIZE);
        }
        self.filled[queue].next_descriptor = (first + parts.len() as u16) % QUEUE_SIZE;
        self.offer_head(queue, first);
        first
    }

    /// Puts bytes somewhere in memory.
    pub fn data(&mut self, bytes: &[u8]) -> u64 {
        if self.next_data + bytes.len() as u64 > MEMORY_BYTES as u64 {
            self.next_data = DATA + 0x8_0000;
        }
        let at = self.next_data;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.next_data += bytes.len() as u64;
        at
    }

    pub fn bytes(&self, address: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Has the device look at the queue until nothing is left.
    pub fn notify(&self, queue: usize) {
        while self.transport.run(Cause::Queue(queue)) {}
    }

    /// The next chain that came back: which one, and how much was written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let filled = &mut self.filled[queue];
        let ring = Self::used_ring(queue);
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == filled.seen {
            return None;
        }
        let slot = ring + 4 + 8 * u64::from(filled.seen % QUEUE_SIZE);
        filled.seen = filled.seen.wrapping_add(1);
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        Some((head as u16, self.memory.read_obj(GuestAddress(slot + 4)).unwrap()))
    }

    /// How many interrupts came since this was asked last.
    pub fn interrupts(&self) -> usize {
        self.interrupts.take()
    }
}
