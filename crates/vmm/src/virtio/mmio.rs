//! Speaks virtio over memory-mapped registers, version 2 (virtio 1.2, section 4.2), for one device.
//!
//! ```text
//!   status   0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK      one step at a time; 0 resets
//!                                features    queues         served
//! ```
//!
//! A driver writes features while it is DRIVER, sets queues up while it is FEATURES_OK, and nothing else: one that breaks
//! this order, or gives a queue a size or place that cannot be, finds NEEDS_RESET in the status, and everything but a reset is
//! ignored from then on. That a queue was notified is not heard here: the kernel tells the devices' thread by an
//! eventfd, and a vCPU's thread never does a device's work.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_queue::{Queue, QueueState, QueueT as _};
use vm_memory::GuestAddress;

use super::queue::Queues;
use super::{
    Broken, Cause, Device, FEATURE_EVENT_IDX, FEATURE_INDIRECT, FEATURE_VERSION_1, Interrupt, Kind, Unlike,
};
use crate::memory::GuestMemory;

/// How much of the guest's addresses a transport takes.
pub const WINDOW_BYTES: u64 = 0x1000;
/// Where the driver writes a queue's index to notify it: what the kernel is asked to watch.
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"SEAL");
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
const IS_DRIVER: u32 = ACKNOWLEDGE | DRIVER;
const HAS_FEATURES: u32 = IS_DRIVER | FEATURES_OK;
const IS_READY: u32 = HAS_FEATURES | DRIVER_OK;

const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// A device's registers, shared by the vCPUs' threads and the devices' one.
pub struct Transport {
    kind: Kind,
    queue_count: usize,
    watched: Option<Arc<OwnedFd>>,
    /// Apart from the lock: a vCPU that takes an interrupt does not wait for a device at work.
    interrupt_status: AtomicU32,
    interrupt: Arc<dyn Interrupt>,
    registers: Mutex<Registers>,
}

/// What of a transport and its device a snapshot keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportState {
    pub kind: Kind,
    pub status: u32,
    pub interrupt_status: u32,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    pub driver_features: u64,
    pub queue_select: u32,
    pub generation: u32,
    pub queues: Vec<QueueState>,
    /// What the device itself keeps.
    pub own: Vec<u8>,
}

/// Why a state cannot be gone on from.
#[derive(Debug, Error)]
pub enum RestoreError {
    #[error("the state is of a {found:?} device, and this is a {kind:?} device")]
    Kind { kind: Kind, found: Kind },
    #[error("the state's status {status:#x} is none that a driver reaches")]
    Status { status: u32 },
    #[error("the state has features that the device does not offer: {features:#x}")]
    Features { features: u64 },
    #[error("the state has other queues than the device")]
    Queues,
    #[error("the state's queue {index} cannot be one")]
    Queue { index: usize },
    #[error(transparent)]
    Device(#[from] Unlike),
}

impl Transport {
    pub fn new(device: Box<dyn Device>, memory: GuestMemory, interrupt: Arc<dyn Interrupt>) -> Self {
        let registers = Registers::new(device, memory);
        Self {
            kind: registers.device.kind(),
            queue_count: registers.queues.len(),
            watched: registers.device.watched(),
            interrupt_status: AtomicU32::new(0),
            interrupt,
            registers: Mutex::new(registers),
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Each of the queues has an eventfd: its index, written to [`QUEUE_NOTIFY`] as 4 bytes.
    pub fn queue_count(&self) -> usize {
        self.queue_count
    }

    /// What the devices' thread watches for reading, beside the queues' eventfds.
    pub fn watched(&self) -> Option<&OwnedFd> {
        self.watched.as_deref()
    }

    /// A vCPU reads. What is no register reads as zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            return self.lock().read_config(at, data);
        }
        let Ok(register) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            0x60 => self.interrupt_status.load(Ordering::Acquire),
            _ => self.lock().read(offset),
        };
        *register = value.to_le_bytes();
    }

    /// A vCPU writes. What is no register takes nothing.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(CONFIG) {
            return self.lock().write_config(at, data);
        }
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            0x64 => {
                self.interrupt_status.fetch_and(!value, Ordering::AcqRel);
            }
            0x70 if value == 0 => {
                self.lock().reset();
                self.interrupt_status.store(0, Ordering::Release);
            }
            _ => {
                let interrupts = self.lock().write(offset, value);
                self.raise(interrupts);
            }
        }
    }

    /// The devices' thread has the device do its work. True when there was more than one call does: the same call is to be
    /// made again, after others had their turn.
    pub fn run(&self, cause: Cause) -> bool {
        let mut registers = self.lock();
        let (interrupts, has_more) = registers.run(cause);
        drop(registers);
        self.raise(interrupts);
        has_more
    }

    /// What the driver did that its device needs a reset for.
    pub fn broken(&self) -> Option<Broken> {
        self.lock().broken
    }

    /// What a snapshot keeps; taken while no vCPU runs.
    pub fn state(&self) -> TransportState {
        let interrupt_status = self.interrupt_status.load(Ordering::Acquire);
        self.lock().state(self.kind, interrupt_status)
    }

    /// Goes on from a state. Every queue is to be run afterwards, and so is [`Cause::Ready`]: notifications are not in a state. Nor
    /// are interrupts on their way: what the driver has not seen yet is signalled once more, which does no harm.
    pub fn restore(&self, state: &TransportState) -> Result<(), RestoreError> {
        if state.kind != self.kind {
            return Err(RestoreError::Kind { kind: self.kind, found: state.kind });
        }
        let mut registers = self.lock();
        let restored = registers.restore(state);
        if restored.is_err() {
            registers.reset();
        }
        drop(registers);
        restored?;
        self.interrupt_status.store(0, Ordering::Release);
        self.raise(state.interrupt_status & (INTERRUPT_USED | INTERRUPT_CONFIG));
        Ok(())
    }

    fn raise(&self, interrupts: u32) {
        if interrupts != 0 {
            self.interrupt_status.fetch_or(interrupts, Ordering::AcqRel);
            self.interrupt.signal();
        }
    }

    /// A thread that panicked with the lock ends the whole process, so what it left is never seen.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue's place as the driver writes it, half by half.
#[derive(Clone, Copy, Default)]
struct Place {
    descriptors: u64,
    available: u64,
    used: u64,
}

struct Registers {
    device: Box<dyn Device>,
    memory: GuestMemory,
    queues: Vec<Queue>,
    places: Vec<Place>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    generation: u32,
    broken: Option<Broken>,
}

impl Registers {
    fn new(device: Box<dyn Device>, memory: GuestMemory) -> Self {
        // A device's sizes are powers of two, of which a queue can be made.
        let queues: Vec<_> =
            device.queue_sizes().iter().filter_map(|size| Queue::new(*size).ok()).take(64).collect();
        Self {
            places: vec![Place::default(); queues.len()],
            queues,
            device,
            memory,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            generation: 0,
            broken: None,
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_IDX
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_select as usize)
    }

    fn read(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.kind() as u32,
            0x0c => VENDOR,
            0x10 => half(self.offered(), self.device_features_select),
            0x34 => self.selected().map_or(0, |queue| queue.max_size().into()),
            0x44 => self.selected().is_some_and(|queue| queue.ready()).into(),
            0x70 => self.status,
            // There is no shared memory: its length and place read as all ones.
            0xb0..=0xbc => u32::MAX,
            0xfc => self.generation,
            _ => 0,
        }
    }

    /// The interrupts that come of it.
    fn write(&mut self, offset: u64, value: u32) -> u32 {
        if self.status & NEEDS_RESET != 0 {
            self.status |= if offset == 0x70 { value & FAILED } else { 0 };
            return 0;
        }
        let mut done = Ok(());
        match offset {
            0x14 => self.device_features_select = value,
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x20 => done = self.write_features(value),
            0x38 | 0x44 | 0x80..=0xa4 => done = self.write_queue(offset, value),
            0x70 => done = self.write_status(value),
            _ => {}
        }
        done.map_or_else(|broken| self.break_off(broken), |()| 0)
    }

    fn write_features(&mut self, value: u32) -> Result<(), Broken> {
        if self.status != IS_DRIVER {
            return Err(Broken::OutOfOrder);
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            // There are no more; a driver that finds none writes none.
            _ if value == 0 => {}
            _ => return Err(Broken::OutOfOrder),
        }
        Ok(())
    }

    fn write_status(&mut self, value: u32) -> Result<(), Broken> {
        if value & FAILED != 0 {
            self.status |= FAILED;
            return Ok(());
        }
        match (self.status, value) {
            (now, value) if now == value => {}
            (0, ACKNOWLEDGE) | (ACKNOWLEDGE, IS_DRIVER) => self.status = value,
            (IS_DRIVER, HAS_FEATURES) => {
                // A driver whose features are refused finds that its bit is not there.
                let wanted = self.driver_features;
                if wanted & !self.offered() == 0 && wanted & FEATURE_VERSION_1 != 0 {
                    self.status = value;
                }
            }
            (HAS_FEATURES, IS_READY) => {
                self.status = value;
                self.activate();
            }
            _ => return Err(Broken::OutOfOrder),
        }
        Ok(())
    }

    fn activate(&mut self) {
        for queue in &mut self.queues {
            queue.set_event_idx(self.driver_features & FEATURE_EVENT_IDX != 0);
        }
        self.device.activate(self.driver_features);
    }

    fn write_queue(&mut self, offset: u64, value: u32) -> Result<(), Broken> {
        let index = self.queue_select as usize;
        let (Some(queue), Some(place)) = (self.queues.get_mut(index), self.places.get_mut(index)) else {
            return Err(Broken::OutOfOrder);
        };
        if offset == 0x44 && value == 0 {
            // Drivers also say so of what a reset has stopped already.
            queue.set_ready(false);
            return Ok(());
        }
        if self.status != HAS_FEATURES || queue.ready() {
            return Err(Broken::OutOfOrder);
        }
        match offset {
            0x38 => {
                let size = u16::try_from(value).map_err(|_| Broken::OutOfOrder)?;
                queue.try_set_size(size).map_err(|_| Broken::OutOfOrder)?;
            }
            0x44 if value == 1 => place.give(queue, &self.memory)?,
            0x80 => set_low(&mut place.descriptors, value),
            0x84 => set_high(&mut place.descriptors, value),
            0x90 => set_low(&mut place.available, value),
            0x94 => set_high(&mut place.available, value),
            0xa0 => set_low(&mut place.used, value),
            0xa4 => set_high(&mut place.used, value),
            _ => return Err(Broken::OutOfOrder),
        }
        Ok(())
    }

    fn read_config(&self, at: u64, data: &mut [u8]) {
        let config = self.device.config();
        let rest = usize::try_from(at).ok().and_then(|at| config.get(at..)).unwrap_or_default();
        let bytes = rest.len().min(data.len());
        data[..bytes].copy_from_slice(&rest[..bytes]);
    }

    fn write_config(&mut self, at: u64, data: &[u8]) {
        let bytes = self.device.config().len() as u64;
        let fits = at.checked_add(data.len() as u64).is_some_and(|end| end <= bytes);
        if fits && self.status & DRIVER != 0 && self.status & NEEDS_RESET == 0 {
            self.device.write_config(at as usize, data);
        }
    }

    /// The interrupts that come of it, and whether there is more to do.
    fn run(&mut self, cause: Cause) -> (u32, bool) {
        if cause == Cause::Ready {
            self.device.ready();
        }
        if self.status != IS_READY {
            return (0, false);
        }
        let mut queues = Queues::new(&self.memory, &mut self.queues);
        let served = self.device.serve(cause, &mut queues).and_then(|()| queues.needs_interrupt());
        let (has_more, has_new_config) = (queues.has_more(), queues.has_new_config());
        let mut interrupts = match served {
            Ok(true) => INTERRUPT_USED,
            Ok(false) => 0,
            Err(broken) => return (self.break_off(broken), false),
        };
        if has_new_config {
            self.generation = self.generation.wrapping_add(1);
            interrupts |= INTERRUPT_CONFIG;
        }
        (interrupts, has_more)
    }

    /// Nothing of the device goes on, so that nothing it watches keeps being ready. The interrupts that come of it.
    fn break_off(&mut self, broken: Broken) -> u32 {
        let interrupts = if self.status & DRIVER_OK != 0 { INTERRUPT_CONFIG } else { 0 };
        self.broken = Some(broken);
        self.status |= NEEDS_RESET;
        self.device.reset();
        interrupts
    }

    fn reset(&mut self) {
        self.device.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.places.fill(Place::default());
        self.status = 0;
        self.broken = None;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }

    fn state(&self, kind: Kind, interrupt_status: u32) -> TransportState {
        TransportState {
            kind,
            status: self.status,
            interrupt_status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            generation: self.generation,
            queues: self.queues.iter().map(Queue::state).collect(),
            own: self.device.state(),
        }
    }

    fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        self.reset();
        let progress = state.status & !(NEEDS_RESET | FAILED);
        if ![0, ACKNOWLEDGE, IS_DRIVER, HAS_FEATURES, IS_READY].contains(&progress) {
            return Err(RestoreError::Status { status: state.status });
        }
        // Before FEATURES_OK they are the driver's wish alone.
        let features = state.driver_features & !self.offered();
        if progress & FEATURES_OK != 0 && features != 0 {
            return Err(RestoreError::Features { features });
        }
        if state.queues.len() != self.queues.len() {
            return Err(RestoreError::Queues);
        }
        for (index, saved) in state.queues.iter().enumerate() {
            let queue = Queue::try_from(*saved).map_err(|_| RestoreError::Queue { index })?;
            let is_sound = !queue.ready() || queue.is_valid(&self.memory);
            if !is_sound || queue.max_size() != self.queues[index].max_size() {
                return Err(RestoreError::Queue { index });
            }
            self.places[index] =
                Place { descriptors: saved.desc_table, available: saved.avail_ring, used: saved.used_ring };
            self.queues[index] = queue;
        }
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.generation = state.generation;
        if state.status == IS_READY {
            self.activate();
        }
        self.device.restore(&state.own)?;
        Ok(())
    }
}

impl Place {
    /// Puts a queue here, if all of it is aligned and in memory.
    fn give(self, queue: &mut Queue, memory: &GuestMemory) -> Result<(), Broken> {
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(|_| Broken::OutOfOrder)?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).map_err(|_| Broken::OutOfOrder)?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(|_| Broken::OutOfOrder)?;
        queue.set_ready(true);
        // A ring at 0 is what a queue without one has.
        if queue.is_valid(memory) && self.available != 0 {
            return Ok(());
        }
        queue.set_ready(false);
        Err(Broken::OutOfOrder)
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

#[cfg(test)]
mod tests;
