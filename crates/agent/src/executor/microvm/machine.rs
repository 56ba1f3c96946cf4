//! Starts the monitor for one machine, which boots or goes on from another, and keeps it until the machine is over.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::socket::{MsgFlags, recv};
use sealci_core::outcome::Limit;
use sealci_core::plan::Resources;
use sealci_guest::wire::machine as inside;
use sealci_image::Digest;
use sealci_microvm::root::Root;
use sealci_microvm::template::Template;
use sealci_vmm::machine::MAX_VCPUS;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Means;
use super::network::Link;
use super::services::Berth;
use super::template::{Templates, Wish};
use crate::executor::cgroup::Limits;
use crate::executor::environment::{Group, HostEnvironment, blocking};
use crate::executor::init::{Environment, Machine, Opening, Prepared};
use crate::executor::{ExecutionRequest, ExecutorError, gate};

/// What the monitor itself may take beside the machine's memory: a few MiB, and what the kernel keeps for it.
const MONITOR_BYTES: u64 = 64 << 20;
/// The monitor's threads: one for each virtual CPU, and a few more.
const MONITOR_PIDS: u64 = 128;
/// Less does not hold a kernel and what it unpacks.
const LEAST_MEBIBYTES: u64 = 128;
/// Where the init calls.
const PORT: u32 = 1024;
/// Where the init of a machine that is saved calls before.
const SNAPSHOT_PORT: u32 = 1025;
/// How long a machine may take to go on. It is a part of what it takes to boot, and some seconds where the processor is emulated.
const RESTORING_PATIENCE: Duration = Duration::from_secs(30);

/// What machines are made of.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    pub means: Arc<Means>,
    /// None where the machine comes up and does nothing.
    pub root: Option<Arc<Root>>,
}

/// What machines have to have in common for one to go on from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kind {
    /// The root's name, which is a digest.
    root: String,
    mebibytes: u64,
    vcpus: u64,
    disk_bytes: u64,
    has_card: bool,
}

impl Kind {
    fn of(recipe: &Recipe, resources: &Resources, has_card: bool) -> Self {
        let root = recipe.root.as_ref().and_then(|root| root.path().file_name());
        Self {
            root: root.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            mebibytes: mebibytes(resources.memory_bytes),
            vcpus: resources.cpu_millis.div_ceil(1000).clamp(1, u64::from(MAX_VCPUS)),
            disk_bytes: recipe.means.blank.bytes(),
            has_card,
        }
    }

    /// Names it among the templates of one generation.
    pub fn key(&self) -> Digest {
        let Self { root, mebibytes, vcpus, disk_bytes, has_card } = self;
        let text = format!("{root} {mebibytes} MiB, {vcpus} CPUs, {disk_bytes} bytes, card: {has_card}");
        Digest::of(text.as_bytes())
    }

    fn limits(&self, cpu_millis: u64) -> Limits {
        let memory_bytes = (self.mebibytes << 20) + MONITOR_BYTES;
        Limits { cpu_millis, memory_bytes, pids: MONITOR_PIDS }
    }
}

/// A machine's size: the monitor maps it by 2 MiB.
fn mebibytes(memory_bytes: u64) -> u64 {
    (memory_bytes >> 20).max(LEAST_MEBIBYTES).next_multiple_of(2)
}

/// How a machine begins.
#[derive(Debug, Clone, Copy)]
enum Begin<'a> {
    Boot,
    /// Boots, and is saved there when it has come up.
    Save(&'a Path),
    /// Goes on from what was saved there.
    Restore(&'a Path),
}

impl Recipe {
    /// The monitor's command line.
    fn arguments(&self, kind: &Kind, begin: Begin<'_>, made_of: &str, disks: &[OsString]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--end-with-stdin".into()];
        let mut say = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        let mut kernel_words = format!("{}={PORT}", inside::PORT_KEY);
        let mut channel = Some(format!("{PORT}=-"));
        match begin {
            Begin::Boot => {}
            Begin::Save(folder) => {
                kernel_words.push_str(&format!(" {}={SNAPSHOT_PORT}", inside::SNAPSHOT_KEY));
                let mut place = OsString::from(format!("{SNAPSHOT_PORT}="));
                place.push(folder);
                say("--snapshot", place);
                // What would be said to it has nothing to do with what is saved.
                channel = None;
            }
            Begin::Restore(folder) => say("--restore", folder.into()),
        }
        if !matches!(begin, Begin::Restore(_)) {
            say("--kernel", self.means.kernel_file().into());
            say("--initramfs", self.means.initramfs.path().into());
            say("--command-line-extra", kernel_words.into());
        }
        say("--made-of", made_of.into());
        say("--memory-mib", kind.mebibytes.to_string().into());
        say("--vcpus", kind.vcpus.to_string().into());
        channel.into_iter().for_each(|channel| say("--vsock", channel.into()));
        disks.iter().for_each(|disk| say("--disk", disk.clone()));
        arguments
    }

    /// The disks of a machine that writes to this one.
    fn disks(&self, written: &Path) -> Vec<OsString> {
        self.root.as_ref().map_or(Vec::new(), |root| vec![read_only(root.path()), written.into()])
    }

    /// Starts the monitor in a control group of this name. Its machine comes up by itself. Blocks.
    fn start(
        &self,
        name: &str,
        limits: &Limits,
        mut arguments: Vec<OsString>,
        link: Option<&Link>,
    ) -> Result<(UnixStream, HostEnvironment), ExecutorError> {
        let mut program = self.means.vmm.clone();
        if let Some(link) = link {
            (program, arguments) = link.around(&program, arguments)?;
        }
        let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
        let cgroup = self.means.cgroups.as_ref().map(|groups| groups.create(name, limits));
        let group = cgroup.transpose().map_err(ExecutorError::Cgroup)?.map_or(Group::None, Group::Own);
        HostEnvironment::spawn(&program, &arguments, group, name.to_owned())
    }
}

/// A machine, before there is one.
#[derive(Debug, Clone)]
struct Order {
    recipe: Recipe,
    kind: Kind,
    /// Its control group's.
    name: String,
    cpu_millis: u64,
    /// Takes its disk.
    scratch: PathBuf,
    link: Option<Link>,
    /// None where it boots in any case.
    templates: Option<Arc<Templates>>,
    services: Arc<[Berth]>,
}

/// A machine that was started.
#[derive(Debug)]
struct Started {
    channel: UnixStream,
    host: HostEnvironment,
    /// What it goes on from.
    template: Option<Template>,
}

impl Order {
    /// Blocks.
    fn start(&self, template: Option<Template>) -> Result<Started, ExecutorError> {
        let written = self.scratch.join("disk");
        // That of one that did not go on.
        let _ = fs::remove_file(&written);
        let disk = self.recipe.means.blank.copy(&written);
        disk.map_err(|error| ExecutorError::io("make the machine's disk")(io::Error::other(error)))?;
        let snapshot = template.as_ref().map(Template::snapshot);
        let begin = snapshot.as_deref().map_or(Begin::Boot, Begin::Restore);
        let made_of = self.templates.as_ref().map(|templates| templates.made_of(&self.kind));
        let mut disks = self.recipe.disks(&written);
        disks.extend(self.services.iter().map(|berth| read_only(&berth.root)));
        let mut arguments = self.recipe.arguments(&self.kind, begin, &made_of.unwrap_or_default(), &disks);
        for (service, berth) in self.services.iter().enumerate() {
            let mut end = OsString::from(format!("{}=", inside::service_port(PORT, service)));
            end.push(&berth.socket);
            arguments.extend(["--vsock".into(), end]);
        }
        let limits = self.kind.limits(self.cpu_millis);
        let (channel, host) = self.recipe.start(&self.name, &limits, arguments, self.link.as_ref())?;
        Ok(Started { channel, host, template })
    }

    async fn boot(&self) -> Result<Started, ExecutorError> {
        let order = self.clone();
        blocking(move || order.start(None)).await
    }

    /// Has it go on from the template of its kind; none where there is none, or none of use, which is gone then.
    async fn restore(&self, stop: &CancellationToken) -> Result<Option<Started>, ExecutorError> {
        let Some(templates) = self.templates.clone() else { return Ok(None) };
        let order = self.clone();
        let starting = blocking(move || match templates.find(&order.kind) {
            Some(template) => order.start(Some(template)).map(Some),
            None => Ok(None),
        });
        let Some(started) = starting.await? else { return Ok(None) };
        let called = stop.run_until_cancelled(calls(&started.channel)).await;
        if called == Some(true) {
            return Ok(Some(started));
        }
        let Started { channel, mut host, template } = started;
        // It ends what its channel ends.
        drop(channel);
        let cleared = end(&mut host, self.link.as_ref(), false).await;
        if called.is_none() {
            return Err(ExecutorError::Stopped);
        }
        if let (Some(templates), Some(template)) = (&self.templates, &template) {
            templates.refuse(&self.kind, template, &host.complaints());
        }
        cleared.map_err(|remains| ExecutorError::io("end a machine")(io::Error::other(remains)))?;
        Ok(None)
    }

    /// What is to be done when it has booted and is up.
    fn wish(&self) -> Option<Wish> {
        let templates = self.templates.clone()?;
        let (recipe, kind, link) = (self.recipe.clone(), self.kind.clone(), self.link.clone());
        Some(Wish { templates, recipe, kind, link })
    }
}

/// What is asked of one machine.
pub(super) struct Wanted {
    pub request: ExecutionRequest,
    pub start: Opening,
    /// Whom the action runs as, in the words of images.
    pub user: String,
    pub link: Option<Link>,
    /// What is beside the action.
    pub services: Vec<Berth>,
    /// Cancelled when it is over.
    pub over: DropGuard,
}

/// Starts an action's machine, with a disk of its own to write to.
pub(super) async fn prepare(
    recipe: Recipe,
    templates: Option<Arc<Templates>>,
    wanted: Wanted,
) -> Result<Prepared, ExecutorError> {
    let Wanted { request, start, user, link, services, over } = wanted;
    let (timeout, grace) = (request.timeout, request.grace);
    let order = Order {
        kind: Kind::of(&recipe, &request.resources, link.is_some()),
        recipe,
        name: request.attempt.to_string(),
        cpu_millis: request.resources.cpu_millis,
        scratch: request.scratch.clone(),
        link,
        // What is saved has no disks for services.
        templates: templates.filter(|_| services.is_empty()),
        services: services.into(),
    };
    let restored = order.restore(&request.stop).await?;
    let Started { channel, host, template } = match restored {
        Some(restored) => restored,
        None => order.boot().await?,
    };
    let behind = if template.is_none() { order.wish() } else { None };
    let link = order.link.clone();
    let machine = Machine {
        host_name: "sealci".to_owned(),
        names: request.names,
        network: link.as_ref().map(Link::inside),
        workspace: request.workspace,
        user,
        services: order.services.iter().map(|berth| berth.user.clone()).collect(),
    };
    let record = link.as_ref().and_then(|link| link.spec.gate.clone());
    let environment = MachineEnvironment {
        host,
        machine,
        link,
        behind,
        ran_out_of_memory: false,
        _template: template,
        _recipe: order.recipe,
        _over: over,
    };
    let environment = gate::told(Box::new(environment), record.as_ref(), &request.notes);
    Ok(Prepared { channel, start, environment, timeout, grace })
}

/// A disk that nobody can write.
fn read_only(root: &Path) -> OsString {
    let mut disk = root.to_owned().into_os_string();
    disk.push(":ro");
    disk
}

/// Whether a machine that goes on calls in time. What it says stays to be heard.
async fn calls(channel: &UnixStream) -> bool {
    let hears = async {
        loop {
            channel.readable().await?;
            let peek = || recv(channel.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK).map_err(io::Error::from);
            match channel.try_io(Interest::READABLE, peek) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                heard => return heard,
            }
        }
    };
    matches!(tokio::time::timeout(RESTORING_PATIENCE, hears).await, Ok(Ok(1..)))
}

/// Ends a machine, whatever it does, and takes down what was around it.
async fn end(host: &mut HostEnvironment, link: Option<&Link>, orderly: bool) -> Result<(), String> {
    kill(host, link);
    host.clear(orderly).await
}

fn kill(host: &mut HostEnvironment, link: Option<&Link>) {
    if link.is_some_and(|link| link.spec.rootless) {
        // The helper kills all that it holds together, and ends behind it.
        host.terminate();
    } else {
        host.kill();
    }
}

/// Boots a machine of a kind, and has it saved. `work` is an empty folder. Once it is stopped nothing of the machine is left.
pub(super) async fn save(
    wish: &Wish,
    to: &Path,
    work: &Path,
    patience: Duration,
    stop: &CancellationToken,
) -> Result<(), ExecutorError> {
    let Wish { templates, recipe, kind, link } = wish;
    let written = work.join("disk");
    // It does not look at it.
    File::create_new(&written)
        .and_then(|file| file.set_len(kind.disk_bytes))
        .map_err(ExecutorError::io("make the machine's disk"))?;
    let link = link.as_ref().map(|link| link.apart(work));
    let disks = recipe.disks(&written);
    let arguments = recipe.arguments(kind, Begin::Save(to), &templates.made_of(kind), &disks);
    let limits = kind.limits(kind.vcpus * 1000);
    let (channel, mut host) = recipe.start("template", &limits, arguments, link.as_ref())?;
    let ended = stop.run_until_cancelled(tokio::time::timeout(patience, host.ended())).await;
    drop(channel);
    let cleared = end(&mut host, link.as_ref(), false).await;
    let complaint = match ended {
        None => return Err(ExecutorError::Stopped),
        Some(Err(_)) => format!("it was not saved within {} s", patience.as_secs()),
        Some(Ok(())) if to.exists() => String::new(),
        Some(Ok(())) => host.complaints(),
    };
    let complaint = if complaint.is_empty() { cleared.err() } else { Some(complaint) };
    complaint.map_or(Ok(()), |complaint| Err(ExecutorError::Helper { doing: "save a machine", complaint }))
}

/// Runs a machine without anything in it until its init calls. Blocks.
pub(super) fn probe(recipe: &Recipe, patience: Duration) -> Result<(), ExecutorError> {
    let resources = Resources { cpu_millis: 1000, memory_bytes: LEAST_MEBIBYTES << 20 };
    let kind = Kind::of(recipe, &resources, false);
    let failed = |error| ExecutorError::io("run a machine")(error);
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    ours.set_read_timeout(Some(patience)).map_err(failed)?;
    let mut monitor = Command::new(&recipe.means.vmm)
        .args(recipe.arguments(&kind, Begin::Boot, "", &[]))
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let called = ours.read_exact(&mut [0]);
    let _ = monitor.kill();
    let output = monitor.wait_with_output().map_err(failed)?;
    let complaint = match called {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            format!("its guest did not come up within {} s; `sealci doctor` says more", patience.as_secs())
        }
        Err(_) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    };
    Err(ExecutorError::Helper { doing: "run a machine", complaint })
}

struct MachineEnvironment {
    /// The monitor, or the helper around it.
    host: HostEnvironment,
    machine: Machine,
    /// None: it reaches nothing.
    link: Option<Link>,
    /// None where it went on from another.
    behind: Option<Wish>,
    ran_out_of_memory: bool,
    /// What it has mapped.
    _template: Option<Template>,
    /// Its root stays while it runs.
    _recipe: Recipe,
    _over: DropGuard,
}

#[async_trait]
impl Environment for MachineEnvironment {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        // It has come up, and has its files: what happens beside it from here on keeps no command from starting.
        if let Some(wish) = self.behind.take() {
            wish.fulfil();
        }
        Ok(())
    }

    fn machine(&self) -> Option<Machine> {
        Some(self.machine.clone())
    }

    fn kill(&mut self) {
        kill(&mut self.host, self.link.as_ref());
    }

    fn ran_out_of_memory(&mut self) {
        self.ran_out_of_memory = true;
    }

    fn limit_reached(&self) -> Option<Limit> {
        if self.ran_out_of_memory { Some(Limit::Memory) } else { self.host.limit_reached() }
    }

    async fn clear(&mut self, orderly: bool) -> Result<(), String> {
        // Nothing of the machine is wanted any more, its own way down neither.
        end(&mut self.host, self.link.as_ref(), orderly).await
    }

    fn complaints(&mut self) -> String {
        self.host.complaints()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind() -> Kind {
        Kind { root: "a.squashfs".to_owned(), mebibytes: 128, vcpus: 1, disk_bytes: 1 << 30, has_card: false }
    }

    #[test]
    fn any_size_is_one_that_the_monitor_maps() {
        let sizes = [0, 128 << 20, 129 << 20, 512 << 20, (513 << 20) + 1];
        assert_eq!(sizes.map(mebibytes), [128, 128, 130, 512, 514]);
    }

    #[test]
    fn kinds_that_differ_in_anything_have_keys_of_their_own() {
        let others = [
            Kind { root: "b.squashfs".to_owned(), ..kind() },
            Kind { mebibytes: 130, ..kind() },
            Kind { vcpus: 2, ..kind() },
            Kind { disk_bytes: 2 << 30, ..kind() },
            Kind { has_card: true, ..kind() },
        ];
        assert_eq!(kind().key(), kind().key());
        let mut keys: Vec<_> = others.iter().chain([&kind()]).map(Kind::key).collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), others.len() + 1);
    }
}
