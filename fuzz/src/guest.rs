//! Plays a hostile guest before a virtio device: registers, memory and queues hold whatever the fuzzer's bytes say.
//!
//! ```text
//!   0 ─ queues ─ 0x1000 ─ data ─ 0x8000 ─ data ─ 0x1_0000   hole   0x2_0000 ─ data ─ 0x2_1000
//!   each of the three pieces lies between pages that nobody may touch
//! ```

use std::cell::RefCell;
use std::sync::Arc;

use sealci_vmm::memory::GuestMemory;
use sealci_vmm::virtio::mmio::{Transport, TransportState};
use sealci_vmm::virtio::{Cause, Device, Interrupt};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes as _, GuestAddress, GuestRegionMmap};

use crate::{Input, within};

const PIECES: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x8000), (0x2_0000, 0x1000)];
const GUARD_BYTES: usize = 0x1000;

const QUEUE_SIZE: u16 = 8;
/// Where a guest that behaves has its data.
pub const DATA: u64 = 0x1000;

/// What a device may have allocated at once: its windows, and lists that grow by doubling.
const MEMORY_BYTES: usize = 4 << 20;

/// Interrupts go nowhere.
struct Nobody;

impl Interrupt for Nobody {
    fn signal(&self) {}
}

pub struct Guest {
    pub memory: GuestMemory,
    transport: Transport,
    next_descriptor: u16,
    offered: Vec<u16>,
}

thread_local! {
    static MEMORY: RefCell<Option<GuestMemory>> = const { RefCell::new(None) };
}

/// The guest's memory, mapped once and all zeros.
fn memory() -> GuestMemory {
    let memory = MEMORY.with_borrow_mut(|memory| memory.get_or_insert_with(mapped).clone());
    for (begin, bytes) in PIECES {
        memory.write_slice(&[0; 0x8000][..bytes], GuestAddress(begin)).expect("it is mapped");
    }
    memory
}

fn mapped() -> GuestMemory {
    let regions = PIECES.map(|(begin, bytes)| {
        let all = bytes + 2 * GUARD_BYTES;
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        // SAFETY: a new mapping, which is never unmapped, touches nobody's memory; its middle becomes what is used.
        let middle = unsafe {
            let mapping = libc::mmap(std::ptr::null_mut(), all, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(mapping, libc::MAP_FAILED);
            let middle = mapping.byte_add(GUARD_BYTES);
            assert_eq!(libc::mprotect(middle, bytes, libc::PROT_READ | libc::PROT_WRITE), 0);
            middle
        };
        // SAFETY: so many bytes are mapped there for good.
        let builder = unsafe { MmapRegionBuilder::new(bytes).with_raw_mmap_pointer(middle.cast()) };
        let region = builder.with_mmap_flags(flags).build().expect("a region");
        GuestRegionMmap::new(region, GuestAddress(begin)).expect("a region")
    });
    GuestMemory::from_regions(regions.into()).expect("memory")
}

impl Guest {
    pub fn new(device: Box<dyn Device>) -> Self {
        let memory = memory();
        let transport = Transport::new(device, memory.clone(), Arc::new(Nobody));
        let offered = vec![0; transport.queue_count()];
        Self { memory, transport, next_descriptor: 0, offered }
    }

    /// Sets the device up as a driver does that behaves.
    pub fn start(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        for (half, value) in [(0, features as u32), (1, (features >> 32) as u32 | 1)] {
            self.set(0x24, half);
            self.set(0x20, value);
        }
        self.set(0x70, 11);
        for queue in 0..self.offered.len() as u32 {
            let base = base(usize::try_from(queue).expect("few")) as u32;
            let place = [
                (0x30, queue),
                (0x38, QUEUE_SIZE.into()),
                (0x80, base),
                (0x90, base + 0x80),
                (0xa0, base + 0xc0),
            ];
            for (register, value) in place {
                self.set(register, value);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    /// Takes one step of a driver's start, whether it is the next one or not.
    pub fn advance(&mut self, step: u8) {
        let base = base(usize::from(step >> 5)) as u32;
        match step % 32 {
            0 => self.set(0x70, 0),
            1 => self.set(0x70, 1),
            2 => self.set(0x70, 3),
            3 => self.set(0x24, 1),
            4 => self.set(0x20, 1),
            5 => self.set(0x70, 11),
            6 => self.set(0x30, u32::from(step >> 5)),
            7 => self.set(0x38, QUEUE_SIZE.into()),
            8 => self.set(0x80, base),
            9 => self.set(0x90, base + 0x80),
            10 => self.set(0xa0, base + 0xc0),
            11 => self.set(0x44, 1),
            12 => self.set(0x70, 15),
            13 => self.set(0x44, 0),
            14 => self.set(0x70, 128),
            _ => self.start(0),
        }
    }

    fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// Takes any bytes as what a guest does; `other` does what only this device's guest, or its host, can.
    pub fn play(&mut self, input: &mut Input<'_>, mut other: impl FnMut(&mut Self, &mut Input<'_>)) {
        within(MEMORY_BYTES, || {
            while !input.is_empty() {
                self.step(input, &mut other);
            }
        });
    }

    /// Likewise, of a guest that does nothing else.
    pub fn play_only(&mut self, input: &mut Input<'_>, mut what: impl FnMut(&mut Self, &mut Input<'_>)) {
        within(MEMORY_BYTES, || {
            while !input.is_empty() {
                what(self, input);
            }
        });
    }

    fn step(&mut self, input: &mut Input<'_>, other: &mut impl FnMut(&mut Self, &mut Input<'_>)) {
        match input.byte() % 16 {
            0 => {
                let register = register(input);
                self.set(register, input.number() as u32);
            }
            1 => {
                let mut bytes = [0; 8];
                let length = input.choice(&[4, 4, 1, 2, 8]);
                self.transport.read(register(input), &mut bytes[..length]);
            }
            2 => {
                let at = register(input);
                let bytes = input.piece();
                self.transport.write(at, &bytes[..bytes.len().min(8)]);
            }
            3 => {
                let at = address(input);
                self.fill(at, input.piece());
            }
            4 => {
                let (queue, index) = (self.queue(input), input.byte());
                let (at, bytes) = (address(input), input.number() as u32);
                let (flags, next) = (input.byte(), input.byte());
                let table = if flags & 0x80 == 0 { base(queue) } else { address(input) };
                self.describe(table, index.into(), at, bytes, u16::from(flags & 7), next.into());
            }
            5 => {
                let queue = self.queue(input);
                self.offer(queue, input.number() as u16);
            }
            6 => {
                // An index that is ahead, or behind.
                let queue = self.queue(input);
                self.offered[queue] = self.offered[queue].wrapping_add(input.number() as u16);
                self.fill(base(queue) + 0x82, &self.offered[queue].to_le_bytes());
            }
            7 | 8 => {
                let queue = self.queue(input);
                self.run(Cause::Queue(queue));
            }
            9 => self.run(Cause::Ready),
            10 => self.start(input.number() | input.number() << 32),
            11 => self.restore(),
            12 => {
                let queue = self.queue(input);
                let parts: Vec<_> = (0..input.byte() % 6)
                    .map(|_| (address(input), input.number() as u32, input.byte() & 1 == 1))
                    .collect();
                self.chain(queue, &parts);
                self.run(Cause::Queue(queue));
            }
            _ => other(self, input),
        }
    }

    fn queue(&self, input: &mut Input<'_>) -> usize {
        usize::from(input.byte()) % self.offered.len()
    }

    /// Puts bytes where there is memory.
    pub fn fill(&mut self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(at));
    }

    fn describe(&mut self, table: u64, index: u16, at: u64, bytes: u32, flags: u16, next: u16) {
        let descriptor =
            [&at.to_le_bytes()[..], &bytes.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.fill(table.wrapping_add(16 * u64::from(index)), &descriptor.concat());
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let slot = base(queue) + 0x84 + 2 * u64::from(self.offered[queue] % QUEUE_SIZE);
        self.fill(slot, &head.to_le_bytes());
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        self.fill(base(queue) + 0x82, &self.offered[queue].to_le_bytes());
    }

    /// Offers a chain of these parts: where, how many bytes, and whether the device writes them.
    pub fn chain(&mut self, queue: usize, parts: &[(u64, u32, bool)]) {
        let first = self.next_descriptor;
        for (count, (at, bytes, writes)) in (0u16..).zip(parts) {
            let index = (first + count) % QUEUE_SIZE;
            let is_last = usize::from(count) + 1 == parts.len();
            let flags = u16::from(!is_last) | u16::from(*writes) << 1;
            self.describe(base(queue), index, *at, *bytes, flags, (index + 1) % QUEUE_SIZE);
        }
        self.next_descriptor = (first + parts.len() as u16) % QUEUE_SIZE;
        self.offer(queue, first);
    }

    /// Nobody adds to the queues meanwhile, so the device comes to an end.
    pub fn run(&mut self, cause: Cause) {
        let ends = (0..8).any(|_| !self.transport.run(cause));
        assert!(ends, "there is always more to do");
    }

    /// What was just saved can be gone on from.
    fn restore(&mut self) {
        let state = self.transport.state();
        self.transport.restore(&state).expect("its own state");
        let queues = state.queues.iter().filter(|queue| queue.ready).count();
        assert!(queues <= self.offered.len());
        self.run_all();
    }

    /// Any state is gone on from, or refused.
    pub fn go_on(&mut self, state: &TransportState) {
        if self.transport.restore(state).is_ok() {
            self.run_all();
        }
    }

    fn run_all(&mut self) {
        for queue in 0..self.offered.len() {
            self.run(Cause::Queue(queue));
        }
        self.run(Cause::Ready);
    }
}

fn base(queue: usize) -> u64 {
    queue as u64 * 0x200
}

/// Any register, mostly one that is there.
fn register(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        255 => input.number(),
        254 => 0x100 | input.number(),
        chosen => u64::from(chosen) & !3,
    }
}

/// Any address, mostly one near something.
pub fn address(input: &mut Input<'_>) -> u64 {
    const EDGES: &[u64] = &[0x7ff0, 0x8000, 0xffe0, 0x1_0000, 0x2_0000, 0x2_0ff0, u64::MAX - 15, 1 << 40];
    match input.byte() {
        255 => input.number(),
        chosen @ 240..=254 => {
            EDGES[usize::from(chosen) % EDGES.len()].wrapping_add(u64::from(input.byte() % 32))
        }
        chosen => u64::from(chosen) * 0x200,
    }
}
