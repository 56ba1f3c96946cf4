//! Runs the virtual CPUs, a thread for each, and carries what they ask for to the devices.
//!
//! Invariants: a thread sends its end exactly once, and then nothing; one that is told to stop does not enter the guest again.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::jail::seccomp::Filter;
use crate::x86_64::acpi;

/// Of every thread of a machine's: less than a huge page, which the host's kernel would give for a stack of Rust's own size.
pub const STACK_BYTES: usize = 256 << 10;

/// How a virtual CPU ended, and with it the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The guest reset the machine, as its kernel does with `reboot=t`.
    Reset,
    /// The guest turned it off.
    Off,
    /// We stopped it.
    Stopped,
    /// We stopped it, and what it was is kept.
    Saved,
    /// It cannot go on.
    Broken(String),
}

/// Exits of the guest to this process, which cost the most of what a guest does.
#[derive(Debug, Default)]
pub struct Exits {
    ports: AtomicU64,
    registers: AtomicU64,
}

impl Exits {
    /// Accesses to ports.
    pub fn ports(&self) -> u64 {
        self.ports.load(Ordering::Relaxed)
    }

    /// Accesses to devices' registers.
    pub fn registers(&self) -> u64 {
        self.registers.load(Ordering::Relaxed)
    }
}

/// What all virtual CPUs of a machine use.
pub struct Shared {
    pub ports: Bus,
    pub registers: Bus,
    pub exits: Exits,
    stop: AtomicBool,
}

impl Shared {
    pub fn new(ports: Bus, registers: Bus) -> Self {
        Self { ports, registers, exits: Exits::default(), stop: AtomicBool::new(false) }
    }
}

thread_local! {
    /// Where the thread's virtual CPU is told not to enter the guest.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// A signal before the guest is entered would be lost; this makes the entry return at once.
extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the thread that runs this handler has put it there and takes it back before it unmaps it. KVM reads the
        // byte, and nobody holds a reference to it while the thread is in `run`.
        unsafe { flag.write_volatile(1) };
    }
}

/// The threads of a machine.
pub struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<VcpuFd>>,
}

impl Threads {
    /// Starts all. Each sends its ending.
    pub fn start<E: Send + 'static>(
        vcpus: Vec<VcpuFd>,
        filter: &Filter,
        shared: &Arc<Shared>,
        ended: &mpsc::SyncSender<E>,
        event: fn(Ending) -> E,
    ) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), on_kick)?;
        let mut all = Self { shared: Arc::clone(shared), threads: Vec::new() };
        for (index, mut vcpu) in vcpus.into_iter().enumerate() {
            let (filter, shared, ended) = (filter.clone(), Arc::clone(shared), ended.clone());
            let run = move || {
                let ending = match filter.apply() {
                    Ok(()) => run(&mut vcpu, &shared),
                    Err(error) => Ending::Broken(error.to_string()),
                };
                // Nobody listens any more once the machine has ended.
                let _ = ended.send(event(ending));
                vcpu
            };
            let thread = thread::Builder::new().name(format!("vcpu{index}")).stack_size(STACK_BYTES);
            all.threads.push(thread.spawn(run)?);
        }
        Ok(all)
    }

    /// Stops all, with nothing half done; none where a thread was lost. Nobody must wait for room for their endings.
    pub fn stop(&mut self) -> Option<Vec<VcpuFd>> {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in &self.threads {
            // It has not been joined, so that its handle is still its own.
            let _ = thread.kill(SIGRTMIN());
        }
        self.threads.drain(..).map(|thread| thread.join().ok()).collect()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

fn run(vcpu: &mut VcpuFd, shared: &Shared) -> Ending {
    IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
    let ending = loop {
        if shared.stop.load(Ordering::SeqCst) {
            break Ending::Stopped;
        }
        if let Some(ending) = step(vcpu, shared) {
            break ending;
        }
    };
    if ending == Ending::Stopped {
        settle(vcpu, shared);
    }
    IMMEDIATE_EXIT.set(ptr::null_mut());
    ending
}

/// Has KVM finish the access that the last exit was for, which it does on the way back into the guest, and not enter it. One may
/// have several parts; no instruction has more than these.
fn settle(vcpu: &mut VcpuFd, shared: &Shared) {
    const MOST_PARTS: usize = 16;
    for _ in 0..MOST_PARTS {
        vcpu.set_kvm_immediate_exit(1);
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => shared.ports.read(u64::from(port), data),
            Ok(VcpuExit::IoOut(port, data)) => shared.ports.write(u64::from(port), data),
            Ok(VcpuExit::MmioRead(address, data)) => shared.registers.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => shared.registers.write(address, data),
            _ => return,
        }
    }
}

/// Runs the guest up to its next exit.
fn step(vcpu: &mut VcpuFd, shared: &Shared) -> Option<Ending> {
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            count(&shared.exits.ports);
            shared.ports.read(u64::from(port), data);
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            count(&shared.exits.ports);
            if acpi::turns_off(port, data) {
                return Some(Ending::Off);
            }
            shared.ports.write(u64::from(port), data);
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&shared.exits.registers);
            shared.registers.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&shared.exits.registers);
            shared.registers.write(address, data);
        }
        // On AMD's processors a triple fault comes as the first, of newer kernels on any as the second.
        Ok(VcpuExit::Shutdown) => return Some(Ending::Reset),
        Ok(VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Some(Ending::Off),
        Ok(VcpuExit::SystemEvent(..)) => return Some(Ending::Reset),
        Ok(VcpuExit::Intr | VcpuExit::Hlt) => {}
        Ok(exit) => return Some(Ending::Broken(format!("the guest left it with {exit:?}"))),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
        Err(error) => return Some(Ending::Broken(format!("KVM cannot run the guest: {error}"))),
    }
    None
}
