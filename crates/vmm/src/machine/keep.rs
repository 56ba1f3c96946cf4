//! Saves a machine, and puts one together again from what was saved.

use std::num::NonZeroU8;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use thiserror::Error;

use super::{Around, BuildError, Filters, Machine, add_serial, create_vcpus, create_vm, describe};
use crate::bus::Bus;
use crate::devices::{Devices, Running};
use crate::memory::{self, GuestMemory};
use crate::serial::SerialLine;
use crate::snapshot::{self, ReadError, Snapshot, State, WriteError};
use crate::vcpu::{Shared, Threads};
use crate::x86_64::state::{ProcessorsState, StateError};

/// Where a machine is saved, when it is told to be.
pub struct Keep {
    /// Not there yet.
    pub folder: PathBuf,
    /// What the machine was made of, in whoever's words who starts it: digests of its kernel and its root, say.
    pub made_of: String,
}

/// What a machine goes on from.
pub struct Restore {
    pub folder: PathBuf,
    /// What it has to be made of.
    pub made_of: String,
    /// What it has to have, where that matters.
    pub memory_mebibytes: Option<u64>,
    pub vcpus: Option<NonZeroU8>,
    pub around: Around,
}

/// Why a machine was not saved. It has ended all the same.
#[derive(Debug, Error)]
pub enum SaveError {
    #[error("nobody has said where the machine is to be saved")]
    Nowhere,
    #[error("a thread of the machine was lost")]
    Lost,
    #[error("the machine cannot be saved")]
    State(#[from] StateError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Why a machine does not go on.
#[derive(Debug, Error)]
pub enum RestoreError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(
        "the snapshot is of a machine made of `{kept}`, and one of `{wanted}` was asked for: take it anew"
    )]
    MadeOf { kept: String, wanted: String },
    #[error(
        "the snapshot is of a machine with {kept} {what}, and one with {wanted} was asked for: take it anew"
    )]
    Size { what: &'static str, kept: u64, wanted: u64 },
    #[error("the snapshot is of a machine {} serial line: start it likewise", if *kept { "with a" } else { "without a" })]
    Serial { kept: bool },
    #[error("the machine cannot go on")]
    State(#[from] StateError),
}

/// What saving a machine takes beside its threads.
pub struct Keeping {
    pub kvm: Kvm,
    /// What the first virtual CPU was told to tell of itself.
    pub id: CpuId,
    pub memory: GuestMemory,
    pub memory_mebibytes: u64,
    pub serial: Option<Arc<SerialLine>>,
    pub keep: Keep,
}

impl Keeping {
    /// The virtual CPUs stop first: what they still ask for is taken by devices, which stop between two pieces of work.
    pub fn save(self, threads: &mut Threads, devices: &mut Running, vm: &VmFd) -> Result<(), SaveError> {
        let vcpus = threads.stop().ok_or(SaveError::Lost)?;
        let devices = devices.stop().ok_or(SaveError::Lost)?;
        let state = State {
            made_of: self.keep.made_of,
            memory_mebibytes: self.memory_mebibytes,
            serial: self.serial.map(|line| line.state()),
            processors: ProcessorsState::take(&self.kvm, vm, &vcpus, &self.id)?,
            devices: devices.state(),
        };
        Ok(snapshot::write(&state, &self.memory, &self.keep.folder)?)
    }
}

impl Machine {
    /// Puts together what was saved, with what it has around it anew: as many disks and ports, the same root, and disks of the same
    /// size.
    pub fn restore(wanted: Restore) -> Result<Self, BuildError> {
        let Snapshot { state, memory } = Snapshot::read(&wanted.folder).map_err(RestoreError::from)?;
        check(&wanted, &state)?;
        let memory = memory::map_copy(state.memory_mebibytes, &memory)?;
        let kvm = Kvm::new().map_err(|error| BuildError::NoKvm { errno: error.errno() })?;
        // As many as a state has at most.
        let ids = describe(&kvm, state.processors.vcpu_count() as u8)?;
        state.processors.check(&ids[0]).map_err(RestoreError::from)?;
        let vm = create_vm(&kvm, &memory)?;
        let vcpus = create_vcpus(&vm, &ids)?;
        state.processors.give(&vm, &vcpus).map_err(RestoreError::from)?;

        // What follows may raise interrupts, which the controllers above take.
        let Around { serial, devices, owner, commands } = wanted.around;
        let mut ports = Bus::default();
        if let (Some(output), Some(line)) = (serial, &state.serial) {
            let go_on = |interrupt, output| SerialLine::go_on(interrupt, output, line);
            add_serial(&vm, &mut ports, output, go_on)?;
        }
        let mut registers = Bus::default();
        let devices = Devices::connect(devices, &vm, &memory, &mut registers)?;
        devices.restore(&state.devices)?;
        let shared = Arc::new(Shared::new(ports, registers));
        let filters = Filters::compile()?;
        Ok(Self { vcpus, devices, owner, filters, shared, commands, keeping: None, vm })
    }
}

/// Whether what was saved is what is wanted.
fn check(wanted: &Restore, state: &State) -> Result<(), RestoreError> {
    if wanted.made_of != state.made_of {
        let (kept, wanted) = (state.made_of.clone(), wanted.made_of.clone());
        return Err(RestoreError::MadeOf { kept, wanted });
    }
    let sizes = [
        ("MiB of memory", state.memory_mebibytes, wanted.memory_mebibytes),
        ("virtual CPUs", state.processors.vcpu_count() as u64, wanted.vcpus.map(|count| count.get().into())),
    ];
    for (what, kept, wanted) in sizes {
        if let Some(wanted) = wanted.filter(|wanted| *wanted != kept) {
            return Err(RestoreError::Size { what, kept, wanted });
        }
    }
    let kept = state.serial.is_some();
    if wanted.around.serial.is_some() == kept { Ok(()) } else { Err(RestoreError::Serial { kept }) }
}
