//! Connects virtio devices with the machine: their registers, interrupts and notifications, and the one thread that works
//! for all of them.
//!
//! ```text
//!   vCPU ── register accesses ──▶ bus ──▶ Transport                one page of addresses for each device
//!   KVM  ── ioeventfd: the driver notifies a queue ──▶ epoll ──▶ the devices' thread ──▶ Transport::run
//!   KVM  ◀── irqfd: an interrupt of its own ◀───────────────────────────────────────────────┘
//! ```
//!
//! Invariant: no virtual CPU does a device's work, and a device that has much to do takes turns with the others.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{IoEventAddress, VmFd};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{self, Bus, Overlap};
use crate::jail::seccomp::{Filter, SeccompError};
use crate::memory::GuestMemory;
use crate::vcpu::STACK_BYTES;
use crate::virtio::mmio::{QUEUE_NOTIFY, RestoreError, Transport, TransportState, WINDOW_BYTES};
use crate::virtio::{Cause, Device, Interrupt};
use crate::x86_64::layout;

/// Why a machine cannot have its devices.
#[derive(Debug, Error)]
pub enum DevicesError {
    #[error("a machine has at most {} devices, and {count} were asked for", layout::MAX_DEVICES)]
    TooMany { count: usize },
    #[error("KVM cannot connect a device's {what}")]
    Kvm { what: &'static str, source: vmm_sys_util::errno::Error },
    #[error("cannot make what the devices' thread waits for")]
    Event(#[from] io::Error),
    #[error(transparent)]
    Overlap(#[from] Overlap),
    #[error(
        "the snapshot is of a machine with {kept} devices, and this one has {count}: give it the same disks and ports"
    )]
    Others { count: usize, kept: usize },
    #[error("the snapshot is of a machine with another device {index}: give it the same disks and ports")]
    Other { index: usize, source: RestoreError },
}

/// Why the devices' thread does not run.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("the devices' thread cannot be started")]
    Thread(#[from] io::Error),
    #[error("the machine's owner cannot be watched: a pipe or a socket is needed")]
    Owner(#[source] io::Error),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// Whoever wants the machine.
pub struct Owner {
    /// Our end of a pipe or socket: its other end closes with the owner, however that one ends.
    pub end: OwnedFd,
    /// Called then, once.
    pub gone: Box<dyn FnOnce() + Send>,
}

/// A device's interrupt: KVM raises it.
struct Line(EventFd);

impl Interrupt for Line {
    fn signal(&self) {
        // The counter is full only where KVM has not looked yet, and then it will.
        let _ = self.0.write(1);
    }
}

impl bus::Device for Transport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        Transport::read(self, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        Transport::write(self, offset, data);
    }
}

/// A machine's devices, before their thread is started.
pub struct Devices {
    epoll: OwnedFd,
    connected: Vec<Connected>,
}

struct Connected {
    transport: Arc<Transport>,
    /// The eventfd of each queue.
    notified: Vec<EventFd>,
}

/// What of a device the thread has to run, as epoll gives it back: the device's index, and its queue's or [`READY`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Work {
    device: u32,
    cause: Cause,
}

const READY: u32 = u32::MAX;
/// No device's: the thread is to end, and the machine's owner is gone.
const STOP: u64 = u64::MAX;
const OWNER_GONE: u64 = u64::MAX - 1;

impl Work {
    fn to_event(self) -> EventData {
        let cause = match self.cause {
            Cause::Queue(index) => index as u32,
            Cause::Ready => READY,
        };
        EventData::new_u64(u64::from(self.device) << 32 | u64::from(cause))
    }

    fn from_event(data: EventData) -> Option<Self> {
        let data = data.u64();
        let cause = match data as u32 {
            READY => Cause::Ready,
            index => Cause::Queue(index as usize),
        };
        (data < OWNER_GONE).then_some(Self { device: (data >> 32) as u32, cause })
    }
}

impl Devices {
    /// Gives each its addresses, its interrupt and its queues' notifications.
    pub fn connect(
        devices: Vec<Box<dyn Device>>,
        vm: &VmFd,
        memory: &GuestMemory,
        registers: &mut Bus,
    ) -> Result<Self, DevicesError> {
        if devices.len() > layout::MAX_DEVICES {
            return Err(DevicesError::TooMany { count: devices.len() });
        }
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        let mut all = Self { epoll, connected: Vec::new() };
        for (index, device) in devices.into_iter().enumerate() {
            all.add(index as u32, device, vm, memory, registers)?;
        }
        Ok(all)
    }

    fn add(
        &mut self,
        index: u32,
        device: Box<dyn Device>,
        vm: &VmFd,
        memory: &GuestMemory,
        registers: &mut Bus,
    ) -> Result<(), DevicesError> {
        let cannot = |what| move |source| DevicesError::Kvm { what, source };
        let address = layout::DEVICES + u64::from(index) * layout::DEVICE_BYTES;
        let line = event()?;
        vm.register_irqfd(&line, layout::DEVICES_INTERRUPT + index).map_err(cannot("interrupt"))?;
        let transport = Arc::new(Transport::new(device, memory.clone(), Arc::new(Line(line))));
        let mut notified = Vec::new();
        for queue in 0..transport.queue_count() {
            let event = event()?;
            let at = IoEventAddress::Mmio(address + QUEUE_NOTIFY);
            vm.register_ioevent(&event, &at, queue as u32).map_err(cannot("queue"))?;
            let work = Work { device: index, cause: Cause::Queue(queue) };
            self.watch(event_fd(&event), work.to_event())?;
            notified.push(event);
        }
        if let Some(watched) = transport.watched() {
            let work = Work { device: index, cause: Cause::Ready };
            self.watch(watched.as_fd(), work.to_event())?;
        }
        registers.add(address, WINDOW_BYTES, Arc::clone(&transport) as Arc<dyn bus::Device>)?;
        self.connected.push(Connected { transport, notified });
        Ok(())
    }

    fn watch(&self, descriptor: BorrowedFd<'_>, data: EventData) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, descriptor, data, EventFlags::IN)?)
    }

    /// What a snapshot keeps of each.
    pub fn state(&self) -> Vec<TransportState> {
        self.connected.iter().map(|connected| connected.transport.state()).collect()
    }

    /// Has each go on from what a snapshot has kept, in the same order.
    pub fn restore(&self, states: &[TransportState]) -> Result<(), DevicesError> {
        let (count, kept) = (self.connected.len(), states.len());
        if count != kept {
            return Err(DevicesError::Others { count, kept });
        }
        for (index, (connected, state)) in self.connected.iter().zip(states).enumerate() {
            connected.transport.restore(state).map_err(|source| DevicesError::Other { index, source })?;
        }
        Ok(())
    }

    /// Starts their thread, which ends with what is returned; its filter binds it before it does anything. With an owner, it
    /// tells when that one is gone.
    pub fn start(self, filter: Filter, owner: Option<Owner>) -> Result<Running, StartError> {
        let stop = event()?;
        self.watch(event_fd(&stop), EventData::new_u64(STOP))?;
        if let Some(owner) = &owner {
            let data = EventData::new_u64(OWNER_GONE);
            // A pipe that hangs up is told of anyway, and what comes by it is nobody's.
            epoll::add(&self.epoll, &owner.end, data, EventFlags::RDHUP)
                .map_err(|error| StartError::Owner(error.into()))?;
        }
        let (told, bound) = mpsc::sync_channel(1);
        let run = move || {
            let is_bound = filter.apply();
            let may_run = is_bound.is_ok();
            // Whoever waits for it does so until it comes.
            let _ = told.send(is_bound);
            if may_run && self.run() == OWNER_GONE {
                owner.into_iter().for_each(|owner| (owner.gone)());
            }
            self
        };
        let thread = thread::Builder::new().name("devices".to_owned()).stack_size(STACK_BYTES).spawn(run)?;
        let running = Running { stop, thread: Some(thread) };
        match bound.recv() {
            Ok(is_bound) => is_bound?,
            Err(_) => return Err(io::Error::other("the devices' thread has ended").into()),
        }
        Ok(running)
    }

    /// All there can be to do.
    fn all_work(&self) -> VecDeque<Work> {
        let of_one = |(device, connected): (u32, &Connected)| {
            let queues = (0..connected.notified.len()).map(Cause::Queue);
            queues.chain([Cause::Ready]).map(move |cause| Work { device, cause }).collect::<Vec<_>>()
        };
        (0..).zip(&self.connected).flat_map(of_one).collect()
    }

    /// Works until it is to end; why it is.
    fn run(&self) -> u64 {
        // A guest that goes on has notified before that was kept; one that is new has done nothing.
        let mut waiting = self.all_work();
        loop {
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            let patience = if waiting.is_empty() { None } else { Some(&at_once) };
            let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 16];
            // It fails by a signal only: the epoll and the buffer are ours.
            let count = epoll::wait(&self.epoll, &mut events, patience).unwrap_or_default();
            for event in &events[..count] {
                match Work::from_event(event.data) {
                    Some(work) if !waiting.contains(&work) => waiting.push_back(work),
                    Some(_) => {}
                    None => return event.data.u64(),
                }
            }
            for work in mem::take(&mut waiting) {
                waiting.extend(self.turn(work));
            }
        }
    }

    /// Does a bounded amount of work; the same again, where there is more.
    fn turn(&self, work: Work) -> Option<Work> {
        let connected = self.connected.get(work.device as usize)?;
        if let Cause::Queue(index) = work.cause {
            // What is notified from here on is another event.
            let _ = connected.notified.get(index)?.read();
        }
        connected.transport.run(work.cause).then_some(work)
    }
}

/// The devices' thread; it ends with this.
pub struct Running {
    stop: EventFd,
    thread: Option<JoinHandle<Devices>>,
}

impl Running {
    /// Ends it, between two pieces of work; the devices back, unless it was lost.
    pub fn stop(&mut self) -> Option<Devices> {
        let _ = self.stop.write(1);
        self.thread.take()?.join().ok()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open for as long as the event is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_do_goes_through_epoll_and_back() {
        for device in [0, 1, 18] {
            for cause in [Cause::Queue(0), Cause::Queue(63), Cause::Ready] {
                let work = Work { device, cause };
                assert_eq!(Work::from_event(work.to_event()), Some(work));
            }
        }
        for none in [STOP, OWNER_GONE] {
            assert_eq!(Work::from_event(EventData::new_u64(none)), None);
        }
    }
}
