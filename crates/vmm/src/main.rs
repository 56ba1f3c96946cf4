//! The program `sealci-vmm`: runs one guest, from its command line to the guest's end.

mod options;

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::num::NonZeroU8;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use sealci_vmm::jail::cell::{self, Cell, Door, Side};
use sealci_vmm::kernel;
use sealci_vmm::machine::{Around, Command, Commands, Config, Control, Ending, Keep, Machine, Restore};
use sealci_vmm::serial::Output;
use sealci_vmm::virtio::Device;
use sealci_vmm::virtio::balloon::Balloon;
use sealci_vmm::virtio::block::{Access, Block};
use sealci_vmm::virtio::entropy::Entropy;
use sealci_vmm::virtio::net::Net;
use sealci_vmm::virtio::vsock::{HostEnd, MIN_GUEST_CID, Vsock};

use options::{Begin, Disk, MEMORY_MEBIBYTES, Options, STANDARD, USAGE};

const USAGE_ERROR: u8 = 2;
/// Nobody else is on a tap but the host, so all cards may have the same: a locally administered one.
const CARD_ADDRESS: [u8; 6] = [0x02, b's', b'e', b'a', b'l', 0x01];

fn main() -> ExitCode {
    let arguments: Vec<_> =
        std::env::args_os().skip(1).map(|text| text.to_string_lossy().into_owned()).collect();
    match arguments.first().map(String::as_str) {
        Some("--help" | "-h") => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Some("--version") => {
            println!("sealci-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let options = match Options::read(arguments) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("error: {error}\n\n{USAGE}");
            return ExitCode::from(USAGE_ERROR);
        }
    };
    match start(options) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn start(options: Options) -> Result<ExitCode, Box<dyn Error>> {
    if let Begin::Extract { kernel, to } = &options.begin {
        return extract(kernel, to).map(|()| ExitCode::SUCCESS);
    }
    match cell::enter()? {
        Side::Outside(keeper) => Ok(keeper.keep()?.into()),
        Side::Inside(cell) => run(options, cell).map(|()| ExitCode::SUCCESS),
    }
}

fn run(options: Options, cell: Cell) -> Result<(), Box<dyn Error>> {
    let (doors, is_saved) = (doors(&options), options.saves());
    let machine = machine(options)?;
    // What is saved is written to a folder, which the jail has none of.
    if is_saved {
        drop(cell);
    } else if !cell.lock(&doors)? {
        eprintln!("note: this kernel has no landlock, so the machine's process is jailed without it");
    }
    let (ending, totals) = machine.run()?;
    let how = match ending {
        Ending::Reset => "has reset the machine",
        Ending::Off => "has turned the machine off",
        Ending::Stopped => "was stopped",
        Ending::Saved => "was saved",
        Ending::Broken(why) => return Err(format!("the guest cannot go on: {why}").into()),
    };
    let (ports, registers) = (totals.port_exits, totals.register_exits);
    eprintln!("the guest {how}, after {ports} exits by ports and {registers} by devices' registers");
    Ok(())
}

fn machine(options: Options) -> Result<Machine, Box<dyn Error>> {
    let (control, commands) = Commands::new();
    let around = Around {
        devices: devices(&options, &control)?,
        owner: options.ends_with_stdin.then(standard_input).transpose()?,
        serial: options.serial.as_deref().map(open_output).transpose()?,
        commands,
    };
    let Options { begin, memory_mebibytes, vcpus, made_of, .. } = options;
    let built = match begin {
        Begin::Kernel(boot) => Machine::build(Config {
            kernel: boot.kernel,
            initramfs: boot.initramfs,
            command_line_extra: boot.command_line_extra,
            memory_mebibytes: memory_mebibytes.unwrap_or(MEMORY_MEBIBYTES),
            vcpus: vcpus.unwrap_or(NonZeroU8::MIN),
            around,
            keep: boot.snapshot.map(|(_, folder)| Keep { folder, made_of }),
        }),
        Begin::Snapshot(folder) => {
            Machine::restore(Restore { folder, made_of, memory_mebibytes, vcpus, around })
        }
        Begin::Extract { .. } => return Err("a kernel that is unpacked runs no guest".into()),
    };
    Ok(built?)
}

/// The file gets its name when it is whole.
fn extract(kernel: &Path, to: &Path) -> Result<(), Box<dyn Error>> {
    if to == Path::new(STANDARD) {
        let mut file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        return Ok(kernel::extract(kernel, &mut file)?);
    }
    let mut partial = to.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let cannot = |error: io::Error| format!("cannot write {}: {error}", partial.display());
    let mut file = File::create(&partial).map_err(cannot)?;
    let done = kernel::extract(kernel, &mut file).map_err(Box::<dyn Error>::from);
    let done =
        done.and_then(|()| Ok(file.sync_all().and_then(|()| fs::rename(&partial, to)).map_err(cannot)?));
    if done.is_err() {
        let _ = fs::remove_file(&partial);
    }
    done
}

fn devices(options: &Options, control: &Control) -> Result<Vec<Box<dyn Device>>, Box<dyn Error>> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for (index, disk) in options.disks.iter().enumerate() {
        devices.push(Box::new(open_disk(disk, index)?));
    }
    let snapshot = match &options.begin {
        Begin::Kernel(boot) => boot.snapshot.as_ref(),
        _ => None,
    };
    if !options.vsock.is_empty() || snapshot.is_some() {
        let ends: Result<BTreeMap<_, _>, io::Error> =
            options.vsock.iter().map(|end| host_end(end, options.saves())).collect();
        let ends = ends.map(|mut ends| {
            ends.extend(snapshot.map(|(port, _)| (*port, when_called(control))));
            ends
        });
        let vsock = ends.and_then(|ends| Vsock::new(MIN_GUEST_CID, ends));
        devices.push(Box::new(vsock.map_err(|error| format!("cannot connect the guest's ports: {error}"))?));
    }
    if let Some(tap) = &options.tap {
        let card = Net::open(tap, CARD_ADDRESS);
        devices.push(Box::new(card.map_err(|error| format!("cannot open the tap {tap}: {error}"))?));
    }
    devices.push(Box::new(Entropy));
    devices.push(Box::new(Balloon::default()));
    Ok(devices)
}

/// What the guest's ports lead to, of which the jail would have nothing otherwise.
fn doors(options: &Options) -> Vec<Door> {
    let sockets = options.vsock.iter().filter(|(_, path)| *path != Path::new(STANDARD));
    sockets.map(|(port, path)| Door { outside: path.clone(), inside: door(*port) }).collect()
}

/// Its name in the jail.
fn door(port: u32) -> String {
    format!("port-{port}")
}

fn host_end((port, path): (&u32, &PathBuf), is_saved: bool) -> io::Result<(u32, HostEnd)> {
    if path != Path::new(STANDARD) {
        let path = if is_saved { path.clone() } else { Path::new("/").join(door(*port)) };
        return Ok((*port, HostEnd::Listener(path)));
    }
    let socket = UnixStream::from(standard_input()?);
    socket.set_nonblocking(true)?;
    Ok((*port, HostEnd::Connected(socket)))
}

/// The guest's call is the word for a snapshot.
fn when_called(control: &Control) -> HostEnd {
    let control = control.clone();
    HostEnd::Waiting(Box::new(move || control.send(Command::Snapshot)))
}

fn standard_input() -> io::Result<OwnedFd> {
    io::stdin().as_fd().try_clone_to_owned()
}

fn open_disk(disk: &Disk, index: usize) -> Result<Block, Box<dyn Error>> {
    let access = if disk.is_read_only { Access::ReadOnly } else { Access::ReadWrite };
    let open = || {
        let file = File::options().read(true).write(access == Access::ReadWrite).open(&disk.path)?;
        Block::new(file, access, &format!("disk{index}"))
    };
    let path = disk.path.display();
    open().map_err(|error| format!("cannot open the disk {path}: {error}").into())
}

fn open_output(path: &Path) -> Result<Output, Box<dyn Error>> {
    if path == Path::new(STANDARD) {
        return Ok(Box::new(io::stdout()));
    }
    let file = File::create(path).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    Ok(Box::new(file))
}

fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
