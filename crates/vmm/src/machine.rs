//! Puts a machine together, runs it, and takes its commands.
//!
//! ```text
//!           Control ── Command ──┐
//!                                ├──▶ Machine::run ──▶ Ending
//! vCPU threads ── their endings ─┘
//! ```
//!
//! Invariant: when [`Machine::run`] has returned, no thread of the machine is left.

mod keep;

use std::io;
use std::num::NonZeroU8;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Bus, Overlap};
use crate::devices::{Devices, DevicesError, Owner, StartError};
use crate::jail::cell::{self, CellError};
use crate::jail::seccomp::{Filter, Role, SeccompError};
use crate::kernel::{Kernel, KernelError, Loaded};
use crate::memory::{self, GuestMemory, MemoryError};
use crate::serial::{Output, SerialLine};
pub use crate::vcpu::Ending;
use crate::vcpu::{Exits, Shared, Threads};
use crate::virtio::Device;
use crate::x86_64::boot::{self, BootError};
use crate::x86_64::registers::{self, RegistersError};
use crate::x86_64::{acpi, cpuid, layout};

use keep::Keeping;
pub use keep::{Keep, Restore, RestoreError, SaveError};

/// More than any action gets.
pub const MAX_VCPUS: u8 = 64;

/// Commands that may wait to be taken.
const WAITING_COMMANDS: usize = 8;

/// What a machine is made of.
pub struct Config {
    pub kernel: PathBuf,
    pub initramfs: Option<PathBuf>,
    /// What the kernel is told beside what makes it start soon.
    pub command_line_extra: String,
    pub memory_mebibytes: u64,
    pub vcpus: NonZeroU8,
    pub around: Around,
    /// Where it can be saved. Before it is, the thread that runs it is not bound, so no stranger's guest should have this.
    pub keep: Option<Keep>,
}

/// What a machine has to do with its host.
pub struct Around {
    /// Where the kernel's messages and its console go; without it the guest has no serial line.
    pub serial: Option<Output>,
    /// Virtio devices, in the order in which the guest finds them.
    pub devices: Vec<Box<dyn Device>>,
    /// Our end of a pipe or socket: the machine is stopped when its other end closes.
    pub owner: Option<OwnedFd>,
    pub commands: Commands,
}

/// Why there is no machine.
#[derive(Debug, Error)]
pub enum BuildError {
    #[error("{}", no_kvm(*errno))]
    NoKvm { errno: i32 },
    #[error("a guest has 1 to {MAX_VCPUS} virtual CPUs, and {vcpus} were asked for")]
    TooManyVcpus { vcpus: u8 },
    #[error("KVM cannot make {what}")]
    Kvm { what: &'static str, source: vmm_sys_util::errno::Error },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Registers(#[from] RegistersError),
    #[error("cannot write the machine's description in the guest's memory")]
    Describe(#[source] GuestMemoryError),
    #[error("cannot make an event")]
    Event(#[source] io::Error),
    #[error(transparent)]
    Overlap(#[from] Overlap),
    #[error(transparent)]
    Devices(#[from] DevicesError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

/// Why a guest cannot be run.
#[derive(Debug, Error)]
pub enum RunError {
    #[error("a virtual CPU's thread cannot be started")]
    Vcpus(#[from] io::Error),
    #[error(transparent)]
    Devices(#[from] StartError),
    #[error(transparent)]
    Limit(#[from] CellError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error(transparent)]
    Save(#[from] SaveError),
}

fn no_kvm(errno: i32) -> String {
    let why = match errno {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => {
            "there is none: load the module kvm-amd or kvm-intel, and turn virtualization on in the firmware \
             (in a virtual machine: nested virtualization in the one around it)"
        }
        libc::EACCES | libc::EPERM => "it may not be used: add the user to the group kvm",
        _ => "it does not work",
    };
    format!("cannot open /dev/kvm ({}): {why}", io::Error::from_raw_os_error(errno))
}

/// What a machine can be told while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Ends it without asking the guest.
    Stop,
    /// Saves it, and ends it.
    Snapshot,
}

enum Event {
    Command(Command),
    Ended(Ending),
}

/// Tells a machine, from any thread.
#[derive(Clone)]
pub struct Control(mpsc::SyncSender<Event>);

impl Control {
    /// Never waits: a machine that does not hear it is about to end, or has as many commands before it as can wait.
    pub fn send(&self, command: Command) {
        let _ = self.0.try_send(Event::Command(command));
    }
}

/// What a machine is told, before there is one.
pub struct Commands {
    events: mpsc::Receiver<Event>,
    told: mpsc::SyncSender<Event>,
}

impl Commands {
    pub fn new() -> (Control, Self) {
        let (told, events) = mpsc::sync_channel(WAITING_COMMANDS);
        (Control(told.clone()), Self { events, told })
    }
}

/// What each kind of thread may ask the host's kernel for.
struct Filters {
    vcpu: Filter,
    devices: Filter,
    main: Filter,
}

impl Filters {
    fn compile() -> Result<Self, SeccompError> {
        Ok(Self {
            vcpu: Filter::compile(Role::Vcpu)?,
            devices: Filter::compile(Role::Devices)?,
            main: Filter::compile(Role::Main)?,
        })
    }
}

/// A machine whose guest has not begun, or does not go on yet.
pub struct Machine {
    vcpus: Vec<VcpuFd>,
    devices: Devices,
    owner: Option<OwnedFd>,
    filters: Filters,
    shared: Arc<Shared>,
    commands: Commands,
    keeping: Option<Keeping>,
    /// The guest's memory belongs to it while it exists.
    vm: VmFd,
}

impl Machine {
    /// Puts it together, with the kernel in its memory and the first virtual CPU before its first instruction.
    pub fn build(config: Config) -> Result<Self, BuildError> {
        let vcpus = config.vcpus.get();
        if vcpus > MAX_VCPUS {
            return Err(BuildError::TooManyVcpus { vcpus });
        }
        // What is given is looked at before anything is made.
        let mut kernel = Kernel::open(&config.kernel)?;
        let memory = memory::map(config.memory_mebibytes)?;
        let kvm = Kvm::new().map_err(|error| BuildError::NoKvm { errno: error.errno() })?;
        let vm = create_vm(&kvm, &memory)?;
        let loaded = kernel.load(&memory)?;

        let Around { serial, devices, owner, commands } = config.around;
        let has_serial = serial.is_some();
        let mut ports = Bus::default();
        let new_line = |interrupt, output| Ok(SerialLine::new(interrupt, output));
        let serial = serial.map(|output| add_serial(&vm, &mut ports, output, new_line)).transpose()?;
        let device_count = devices.len();
        let mut registers = Bus::default();
        let devices = Devices::connect(devices, &vm, &memory, &mut registers)?;
        let description = acpi::Description { vcpus, devices: device_count, has_serial };
        let rsdp = acpi::write(&memory, description).map_err(BuildError::Describe)?;
        let initramfs =
            config.initramfs.map(|path| boot::load_initramfs(&memory, &loaded, &path)).transpose()?;
        let line = boot::command_line(has_serial, &config.command_line_extra);
        boot::write_parameters(&memory, &loaded, &line, initramfs, rsdp)?;

        let ids = describe(&kvm, vcpus)?;
        let vcpus = create_vcpus(&vm, &ids)?;
        start_at(&vcpus, &memory, &loaded)?;
        let keeping = config.keep.map(|keep| Keeping {
            kvm,
            id: ids[0].clone(),
            memory,
            memory_mebibytes: config.memory_mebibytes,
            serial,
            keep,
        });
        let shared = Arc::new(Shared::new(ports, registers));
        let filters = Filters::compile()?;
        Ok(Self { vcpus, devices, owner, filters, shared, commands, keeping, vm })
    }

    /// Runs the guest to its end. The calling thread is bound as the machine's are: it can print, and end the process. One that can
    /// be saved is not bound.
    pub fn run(self) -> Result<(Ending, Totals), RunError> {
        let Self { vcpus, devices, owner, filters, shared, commands, keeping, vm } = self;
        let Commands { events, told } = commands;
        let owner = owner.map(|end| {
            let control = Control(told.clone());
            Owner { end, gone: Box::new(move || control.send(Command::Stop)) }
        });
        let mut devices = devices.start(filters.devices, owner)?;
        let mut threads = Threads::start(vcpus, &filters.vcpu, &shared, &told, Event::Ended)?;
        cell::forbid_processes()?;
        if keeping.is_none() {
            filters.main.apply()?;
        }
        // We hold a sender ourselves, so that it always ends with an event.
        let event = events.recv();
        // Threads that end now have room for their word, or nobody who hears it.
        drop(events);
        let ending = match event {
            Ok(Event::Ended(ending)) => ending,
            Ok(Event::Command(Command::Stop)) | Err(_) => Ending::Stopped,
            Ok(Event::Command(Command::Snapshot)) => {
                keeping.ok_or(SaveError::Nowhere)?.save(&mut threads, &mut devices, &vm)?;
                Ending::Saved
            }
        };
        drop(threads);
        drop(devices);
        Ok((ending, Totals::of(&shared.exits)))
    }
}

/// What running the guest took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    pub port_exits: u64,
    pub register_exits: u64,
}

impl Totals {
    fn of(exits: &Exits) -> Self {
        Self { port_exits: exits.ports(), register_exits: exits.registers() }
    }
}

fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, BuildError> {
    let cannot = |what| move |source| BuildError::Kvm { what, source };
    let vm = kvm.create_vm().map_err(cannot("a machine"))?;
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
        };
        // SAFETY: the region is mapped until this process ends, and regions of one guest's memory do not overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(cannot("the guest's memory"))?;
    }
    vm.set_identity_map_address(layout::IDENTITY_MAP).map_err(cannot("a page of its own"))?;
    vm.set_tss_address(layout::TSS as usize).map_err(cannot("pages of its own"))?;
    vm.create_irq_chip().map_err(cannot("interrupt controllers"))?;
    Ok(vm)
}

/// What each virtual CPU is told to tell of itself; at least one.
fn describe(kvm: &Kvm, count: u8) -> Result<Vec<CpuId>, BuildError> {
    let cannot = |source| BuildError::Kvm { what: "a virtual CPU", source };
    let supported: CpuId = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(cannot)?;
    let of_one = |index| {
        let mut id = supported.clone();
        cpuid::adapt(&mut id, index, count);
        id
    };
    Ok((0..count.max(1)).map(of_one).collect())
}

fn create_vcpus(vm: &VmFd, ids: &[CpuId]) -> Result<Vec<VcpuFd>, BuildError> {
    let cannot = |source| BuildError::Kvm { what: "a virtual CPU", source };
    let mut vcpus = Vec::new();
    for (index, id) in (0..).zip(ids) {
        let vcpu = vm.create_vcpu(index).map_err(cannot)?;
        vcpu.set_cpuid2(id).map_err(cannot)?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Has the first begin at the kernel's entry.
fn start_at(vcpus: &[VcpuFd], memory: &GuestMemory, kernel: &Loaded) -> Result<(), RegistersError> {
    registers::write_tables(memory)?;
    for (index, vcpu) in vcpus.iter().enumerate() {
        registers::prepare(vcpu)?;
        if index == 0 {
            registers::enter(vcpu, kernel.entry)?;
        }
    }
    Ok(())
}

fn add_serial(
    vm: &VmFd,
    ports: &mut Bus,
    output: Output,
    make: impl FnOnce(EventFd, Output) -> io::Result<SerialLine>,
) -> Result<Arc<SerialLine>, BuildError> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::Event)?;
    let cannot = |source| BuildError::Kvm { what: "a serial line", source };
    vm.register_irqfd(&interrupt, layout::COM1_INTERRUPT).map_err(cannot)?;
    let line = Arc::new(make(interrupt, output).map_err(BuildError::Event)?);
    ports.add(layout::COM1, layout::COM1_PORTS, line.clone())?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_kvm_it_says_what_to_do() {
        assert!(no_kvm(libc::ENOENT).contains("load the module"));
        assert!(no_kvm(libc::EACCES).contains("group kvm"));
    }
}
