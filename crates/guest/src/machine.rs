//! Makes a machine ready of which this is the first process, and keeps it until its action is over.
//!
//! ```text
//! dev, proc, sys ─▶ modules ─▶ squashfs (vda) ─▶ [be saved, go on] ─▶ call the host ─▶ be woken ─▶ loopback, card, scratch disk (vdb)
//!                        ─▶ an init in an environment of its own for the action, and for each service ─▶ the action's end ─▶ restart
//! ```
//! The host is called before anything that could go wrong for want of a part, so that it hears what is wrong. What goes wrong
//! before goes to the console. However it ends, the machine does. Invariant: what can be saved knows nothing of what will run, and
//! has not looked at the scratch disk, which is another one afterwards.

mod environment;
mod network;
mod root;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use sealci_guest::wire::machine::{HOST_CID, PORT_KEY, SNAPSHOT_KEY};
use sealci_guest::wire::{self, FromInit, HEADER_BYTES, Header, ToInit, Wake};

use crate::failure::{Failure, While};
use crate::supervisor::Supervisor;
use crate::sys::{self, Watch};

/// Where the initial RAM disk has them.
const MODULES: &str = "/modules";
/// How long the host may take to read the report before the machine ends.
const LAST_WORD_PATIENCE: Duration = Duration::from_secs(10);

/// How long a machine may take to be saved, on its own clock, which stands still meanwhile.
const SAVING_PATIENCE: Duration = Duration::from_secs(60);

/// What a supervisor knows of the machine it is in.
#[derive(Debug, Clone)]
pub struct Machine {
    /// On this kernel's boot-time clock, before the host was called.
    called_at: Duration,
    /// The host's clock at that moment or later, once it is told.
    host_clock: Option<Duration>,
    /// Why nothing can run here.
    trouble: Option<String>,
}

/// Whether this is the first process of a machine, of our own initial RAM disk. An image could have that one's files, but nobody
/// but a kernel calls the init by this name.
pub fn is_this() -> bool {
    std::process::id() == 1
        && std::env::args_os().next().is_some_and(|name| name == "/init")
        && Path::new(MODULES).join("order").exists()
}

/// Serves, and ends the machine.
pub fn live() -> ! {
    if let Err(failure) = serve() {
        eprintln!("sealci-init: {failure}");
    }
    sys::machine::restart()
}

fn serve() -> Result<(), Failure> {
    root::mount_early()?;
    let command_line = fs::read_to_string("/proc/cmdline").doing(|| "read /proc/cmdline".to_owned())?;
    let of_line = |key| port_of(&command_line, key);
    let naming = |key| move || format!("find `{key}=` on the kernel's command line");
    let missing = || io::Error::other("it is not there");
    let port = of_line(PORT_KEY).and_then(|port| port.ok_or_else(missing)).doing(naming(PORT_KEY))?;
    let snapshot_port = of_line(SNAPSHOT_KEY).doing(naming(SNAPSHOT_KEY))?;
    load_modules()?;
    let lower = root::mount_lower(root::ROOT_DISK);
    if let Some(port) = snapshot_port {
        be_saved(port).doing(|| format!("be saved by the host's port {port}"))?;
    }
    let called_at = sys::boot_time().doing(|| "read the clock".to_owned())?;
    let channel =
        sys::machine::call(HOST_CID, port, None).doing(|| format!("call the host's port {port}"))?;
    let mut machine = Machine { called_at, host_clock: None, trouble: None };
    let held = be_woken(&channel).doing(|| "be woken by the host".to_owned()).and_then(|wake| {
        machine.wake(&wake)?;
        lower.and_then(|()| make_ready(&wake))?;
        environment::hold(&channel, port, &machine, &wake)
    });
    if let Err(failure) = held {
        let machine = machine.in_trouble(failure.to_string());
        let told =
            channel.try_clone().and_then(|channel| Supervisor::new(channel, None)?.of(machine).serve());
        told.doing(|| "tell the host what is wrong".to_owned())?;
    }
    wait_for_the_host(channel);
    Ok(())
}

/// Says that it is there, and hears what a machine cannot know by itself.
fn be_woken(mut channel: &File) -> io::Result<Wake> {
    let mut hello = Vec::new();
    FromInit::Hello { version: wire::VERSION }.encode(&mut hello).map_err(io::Error::other)?;
    channel.write_all(&hello)?;
    loop {
        let mut head = [0; HEADER_BYTES];
        channel.read_exact(&mut head)?;
        let header = Header::parse(head, wire::MAX_TO_INIT_BYTES).map_err(io::Error::other)?;
        let mut payload = vec![0; header.payload_bytes];
        channel.read_exact(&mut payload)?;
        match ToInit::decode(header.kind, &payload).map_err(io::Error::other)? {
            ToInit::Hello { version: wire::VERSION } => {}
            ToInit::Hello { version } => return Err(io::Error::other(wire::unlike(version))),
            ToInit::Wake(wake) => return Ok(wake),
            _ => return Err(io::Error::other("it says something else first")),
        }
    }
}

/// Makes ready what all environments have in common.
fn make_ready(wake: &Wake) -> Result<(), Failure> {
    sys::machine::raise("lo").doing(|| "set the loopback interface going".to_owned())?;
    if let Some(network) = &wake.network {
        network::connect(network)?;
    }
    sys::machine::raise_file_limit().doing(|| "raise the limit of open files".to_owned())?;
    root::mount_writable()
}

/// The port of the host's that stands there.
fn port_of(command_line: &str, key: &str) -> io::Result<Option<u32>> {
    let mut words = command_line.split_ascii_whitespace();
    let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let parse = |value: &str| value.parse().map_err(|_| io::Error::other(format!("`{value}` is no port")));
    value.map(parse).transpose()
}

/// Returns in a machine that goes on from what was saved here, and in one that nobody saves.
fn be_saved(port: u32) -> io::Result<()> {
    match sys::machine::call(HOST_CID, port, Some(SAVING_PATIENCE)) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other("somebody has answered")),
    }
}

/// Of the whole machine, since it booted.
fn oom_kills(vmstat: &str) -> u64 {
    let count = vmstat.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
    count.unwrap_or(0)
}

fn load_modules() -> Result<(), Failure> {
    let order = Path::new(MODULES).join("order");
    let names = fs::read_to_string(&order).doing(|| format!("read {}", order.display()))?;
    for name in names.lines() {
        let path = Path::new(MODULES).join(format!("{name}.ko"));
        let module = File::open(&path).doing(|| format!("read {}", path.display()))?;
        sys::machine::load_module(&module)
            .doing(|| format!("load the module `{name}`, which may be another kernel's"))?;
    }
    // They take memory, and nobody sees them any more.
    let _ = fs::remove_dir_all(MODULES);
    let _ = fs::remove_file("/init");
    Ok(())
}

/// What was sent is on its way when the machine ends, and lost then: so whoever reads it hangs up first.
fn wait_for_the_host(channel: File) {
    let give_up_at = Instant::now() + LAST_WORD_PATIENCE;
    let mut channel = std::os::unix::net::UnixStream::from(std::os::fd::OwnedFd::from(channel));
    let _ = channel.shutdown(Shutdown::Write);
    let mut waste = [0; 4096];
    while let Some(left) = give_up_at.checked_duration_since(Instant::now()) {
        let mut watches = [Watch::new(&channel.as_fd(), true, false)];
        if sys::poll(&mut watches, Some(left)).is_err() {
            return;
        }
        match channel.read(&mut waste) {
            Ok(0) => return,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
            _ => {}
        }
    }
}

impl Machine {
    /// Why nothing can run here; said once.
    pub fn take_trouble(&mut self) -> Option<String> {
        self.trouble.take()
    }

    /// As it is where nothing can run.
    pub fn in_trouble(self, why: String) -> Self {
        Self { trouble: Some(why), ..self }
    }

    /// Takes what the host knows: the time, what is secret, the machine's name.
    fn wake(&mut self, wake: &Wake) -> Result<(), Failure> {
        self.host_clock = Some(Duration::from_millis(wake.host_boot_ms));
        if wake.unix_time_us != 0 {
            sys::machine::set_clock(Duration::from_micros(wake.unix_time_us))
                .doing(|| "set the clock".to_owned())?;
        }
        if !wake.entropy.is_empty() {
            sys::machine::add_entropy(&wake.entropy).doing(|| "stir the random numbers".to_owned())?;
        }
        if !wake.host_name.is_empty() {
            sys::machine::set_host_name(&wake.host_name).doing(|| "set the host name".to_owned())?;
        }
        Ok(())
    }

    /// Whether its kernel has killed processes to have memory.
    pub fn ran_out_of_memory(&self) -> bool {
        oom_kills(&fs::read_to_string("/proc/vmstat").unwrap_or_default()) > 0
    }

    /// What this kernel's clock reads when the host's reads `at`, or a moment before: the host read its own after it was called.
    /// None while that is not known.
    pub fn in_own_clock(&self, at: Duration) -> Option<Duration> {
        Some((self.called_at + at).saturating_sub(self.host_clock?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_stands_on_the_command_line() {
        let line = "console=ttyS0 sealci.port=1024 quiet sealci.snapshot=7\n";
        assert_eq!(port_of(line, PORT_KEY).unwrap(), Some(1024));
        assert_eq!(port_of(line, SNAPSHOT_KEY).unwrap(), Some(7));
        for none in ["quiet", "sealci.portal=1"] {
            assert_eq!(port_of(none, PORT_KEY).unwrap(), None, "{none}");
        }
        for line in ["sealci.port=", "sealci.port=-1", "sealci.port=4294967296"] {
            let error = port_of(line, PORT_KEY).unwrap_err().to_string();
            assert!(error.contains("no port"), "{line}: {error}");
        }
    }

    #[test]
    fn what_the_kernel_killed_is_counted() {
        assert_eq!(oom_kills("nr_free_pages 7\noom_kill 3\noom_killer 9\n"), 3);
        assert_eq!(oom_kills("nr_free_pages 7\n"), 0);
    }

    #[test]
    fn a_lease_ends_no_later_here_than_there() {
        let seconds = Duration::from_secs;
        let mut machine = Machine { called_at: seconds(2), host_clock: None, trouble: None };
        assert_eq!(machine.in_own_clock(seconds(1040)), None);
        // The host read 1001 when the call of 2 had come; what is 40 s after that there is 42 here, or sooner.
        machine.host_clock = Some(seconds(1001));
        assert_eq!(machine.in_own_clock(seconds(1041)), Some(seconds(42)));
        // A lease that was over before the machine began is over.
        assert_eq!(machine.in_own_clock(seconds(5)), Some(seconds(0)));
    }
}
