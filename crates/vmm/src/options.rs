//! Reads the command line of `sealci-vmm`.

use std::collections::BTreeMap;
use std::num::NonZeroU8;
use std::path::PathBuf;

use thiserror::Error;

pub const USAGE: &str = "\
sealci-vmm: runs a Linux guest behind hardware virtualization (KVM)

usage: sealci-vmm --kernel FILE [OPTION…]
       sealci-vmm --restore FOLDER [OPTION…]

  --kernel FILE               a bzImage or a vmlinux
  --initramfs FILE            its initial RAM disk
  --command-line-extra TEXT   what the kernel is told beside what makes it start soon
  --memory-mib N              the guest's memory (256 without it)
  --vcpus N                   how many virtual CPUs it has (1 without it)
  --serial FILE               gives it a serial line and console, written to a file, or with - to standard output
  --disk FILE[:ro]            a disk, /dev/vda, /dev/vdb, … in this order; with :ro it cannot be written
  --vsock PORT=SOCKET         what connects to this port of CID 2 gets this listening unix socket of the host's, or with -
                              the socket that is standard input
  --tap NAME                  a network card, on this tap of the network namespace in which it is started
  --end-with-stdin            stops the guest when standard input, a pipe or a socket, is closed by its other end
  --snapshot PORT=FOLDER      saves the machine when its guest calls this port of CID 2, and ends it; the folder is made
  --restore FOLDER            goes on from a machine that was saved, instead of starting a kernel: its guest's call is
                              refused. It takes the same root, as many disks and ports, and written disks of the same size
  --made-of TEXT              what the machine is made of, digests of kernel and root, say: saved with it, and what is
                              restored has to be made of the same
  --extract FILE              runs no guest, but writes the vmlinux that is in the bzImage to a file, or with - to the one
                              that is standard output: guests need not unpack it then, and have it at an address that
                              is no secret
  --version                   says which version this is

Disks and ports may be several; the guest's own CID is 3. It has a source of random
numbers, and a balloon by which it gives back what memory it does not use.
What runs the guest is a process of its own that can reach nothing: it has an empty root,
no network, no other process and no capability, and is nobody; started by a user it needs
user namespaces for that. Root's sockets must let everybody connect (mode 0666). A machine
that may be saved is not shut in so, and should run nothing of a stranger's.
It ends with 0 when the guest has reset the machine or turned it off.";

/// What a guest has that was not told otherwise.
pub const MEMORY_MEBIBYTES: u64 = 256;

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    pub begin: Begin,
    /// Where a machine that goes on has them anyway, they have to be these.
    pub memory_mebibytes: Option<u64>,
    pub vcpus: Option<NonZeroU8>,
    pub made_of: String,
    pub serial: Option<PathBuf>,
    pub disks: Vec<Disk>,
    /// By port.
    pub vsock: BTreeMap<u32, PathBuf>,
    pub tap: Option<String>,
    pub ends_with_stdin: bool,
}

/// How a guest begins.
#[derive(Debug, PartialEq, Eq)]
pub enum Begin {
    Kernel(Boot),
    /// From a machine that was saved in this folder.
    Snapshot(PathBuf),
    /// Not at all: the kernel is unpacked into this file.
    Extract {
        kernel: PathBuf,
        to: PathBuf,
    },
}

/// A kernel, and what it is given.
#[derive(Debug, PartialEq, Eq)]
pub struct Boot {
    pub kernel: PathBuf,
    pub initramfs: Option<PathBuf>,
    pub command_line_extra: String,
    /// The port that its guest calls, and the folder in which it is saved then.
    pub snapshot: Option<(u32, PathBuf)>,
}

/// In the place of a path: standard input, or standard output.
pub const STANDARD: &str = "-";

/// A disk that is a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    pub path: PathBuf,
    pub is_read_only: bool,
}

/// Why a command line is none.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum OptionsError {
    #[error("there is no option `{0}`")]
    Unknown(String),
    #[error("the option {0} needs a value")]
    NoValue(String),
    #[error("the option {0} was given twice")]
    Twice(&'static str),
    #[error("`{value}` is no value of {option}: a whole number is needed")]
    NoNumber { option: &'static str, value: String },
    #[error("`{0}` is no value of --vsock: PORT=SOCKET is needed, each port once")]
    Vsock(String),
    #[error("`{0}` is no value of --snapshot: PORT=FOLDER is needed, a port that no --vsock has")]
    Snapshot(String),
    #[error("the option {0} does not go with --restore: what was saved has it already")]
    Restored(&'static str),
    #[error("the option --kernel is missing")]
    NoKernel,
}

impl Options {
    /// Whether the machine may be saved.
    pub fn saves(&self) -> bool {
        matches!(&self.begin, Begin::Kernel(Boot { snapshot: Some(_), .. }))
    }

    /// Reads all arguments but the program's name.
    pub fn read(arguments: impl IntoIterator<Item = String>) -> Result<Self, OptionsError> {
        let (mut kernel, mut initramfs, mut serial, mut made_of) = (None, None, None, None);
        let (mut extra, mut memory, mut vcpus, mut tap, mut extract) = (None, None, None, None, None);
        let (mut snapshot, mut restore) = (None, None);
        let (mut disks, mut vsock, mut ends_with_stdin) = (Vec::new(), BTreeMap::new(), false);
        let mut arguments = arguments.into_iter();
        while let Some(name) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| OptionsError::NoValue(name.clone()));
            let (option, place) = match name.as_str() {
                "--end-with-stdin" => {
                    ends_with_stdin = true;
                    continue;
                }
                "--disk" => {
                    disks.push(Disk::read(&value()?));
                    continue;
                }
                "--vsock" => {
                    let text = value()?;
                    let end = port_and_socket(&text).filter(|(port, _)| !vsock.contains_key(port));
                    vsock.extend([end.ok_or(OptionsError::Vsock(text))?]);
                    continue;
                }
                "--kernel" => ("--kernel", &mut kernel),
                "--initramfs" => ("--initramfs", &mut initramfs),
                "--command-line-extra" => ("--command-line-extra", &mut extra),
                "--memory-mib" => ("--memory-mib", &mut memory),
                "--vcpus" => ("--vcpus", &mut vcpus),
                "--serial" => ("--serial", &mut serial),
                "--tap" => ("--tap", &mut tap),
                "--extract" => ("--extract", &mut extract),
                "--snapshot" => ("--snapshot", &mut snapshot),
                "--restore" => ("--restore", &mut restore),
                "--made-of" => ("--made-of", &mut made_of),
                _ => return Err(OptionsError::Unknown(name)),
            };
            if place.replace(value()?).is_some() {
                return Err(OptionsError::Twice(option));
            }
        }
        let snapshot = snapshot
            .map(|text: String| {
                let place = port_and_socket(&text).filter(|(port, _)| !vsock.contains_key(port));
                place.ok_or(OptionsError::Snapshot(text))
            })
            .transpose()?;
        let begin = match restore {
            Some(folder) => {
                let given = [
                    ("--kernel", kernel.is_some()),
                    ("--initramfs", initramfs.is_some()),
                    ("--command-line-extra", extra.is_some()),
                    ("--snapshot", snapshot.is_some()),
                    ("--extract", extract.is_some()),
                ];
                if let Some((option, _)) = given.into_iter().find(|(_, is_given)| *is_given) {
                    return Err(OptionsError::Restored(option));
                }
                Begin::Snapshot(folder.into())
            }
            None => {
                let kernel = kernel.ok_or(OptionsError::NoKernel)?.into();
                match extract {
                    Some(to) => Begin::Extract { kernel, to: to.into() },
                    None => Begin::Kernel(Boot {
                        kernel,
                        initramfs: initramfs.map(PathBuf::from),
                        command_line_extra: extra.unwrap_or_default(),
                        snapshot,
                    }),
                }
            }
        };
        Ok(Self {
            begin,
            memory_mebibytes: number("--memory-mib", memory)?,
            vcpus: number("--vcpus", vcpus)?,
            made_of: made_of.unwrap_or_default(),
            serial: serial.map(PathBuf::from),
            disks,
            vsock,
            tap,
            ends_with_stdin,
        })
    }
}

impl Disk {
    fn read(text: &str) -> Self {
        match text.strip_suffix(":ro") {
            Some(path) => Self { path: path.into(), is_read_only: true },
            None => Self { path: text.into(), is_read_only: false },
        }
    }
}

fn port_and_socket(text: &str) -> Option<(u32, PathBuf)> {
    let (port, socket) = text.split_once('=')?;
    Some((port.parse().ok()?, socket.into()))
}

fn number<T: std::str::FromStr>(
    option: &'static str,
    value: Option<String>,
) -> Result<Option<T>, OptionsError> {
    let parse = |value: String| value.parse().map_err(|_| OptionsError::NoNumber { option, value });
    value.map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Options, OptionsError> {
        Options::read(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_is_asked_for_is_read() {
        let plain = read("--kernel k").unwrap();
        assert_eq!((plain.memory_mebibytes, plain.vcpus, plain.serial), (None, None, None));
        assert_eq!((plain.tap, read("--kernel k --tap t0").unwrap().tap), (None, Some("t0".to_owned())));
        let all = read(
            "--vcpus 4 --end-with-stdin --kernel k --memory-mib 6144 --initramfs i --serial - --command-line-extra x",
        );
        let all = all.unwrap();
        assert!(all.ends_with_stdin && !plain.ends_with_stdin);
        assert_eq!((all.memory_mebibytes, all.vcpus), (Some(6144), NonZeroU8::new(4)));
        assert_eq!(all.serial, Some("-".into()));
        let boot = Boot {
            kernel: "k".into(),
            initramfs: Some("i".into()),
            command_line_extra: "x".to_owned(),
            snapshot: None,
        };
        assert_eq!(all.begin, Begin::Kernel(boot));
        let extracted = read("--kernel k --extract f").unwrap();
        assert_eq!(extracted.begin, Begin::Extract { kernel: "k".into(), to: "f".into() });
    }

    #[test]
    fn a_machine_is_saved_or_restored() {
        let saved = read("--kernel k --snapshot 9=/f --made-of it").unwrap();
        let Begin::Kernel(boot) = saved.begin else { panic!("{saved:?}") };
        assert_eq!((boot.snapshot, saved.made_of.as_str()), (Some((9, "/f".into())), "it"));
        let restored = read("--restore /f --vcpus 2 --disk d").unwrap();
        assert_eq!(restored.begin, Begin::Snapshot("/f".into()));
        for wrong in ["/f", "x=/f", "9=/f --vsock 9=/s"] {
            let error = read(&format!("--kernel k --snapshot {wrong}")).unwrap_err();
            assert!(matches!(error, OptionsError::Snapshot(_)), "{wrong}");
        }
        for other in ["--kernel", "--initramfs", "--command-line-extra", "--extract"] {
            assert_eq!(read(&format!("--restore f {other} x")), Err(OptionsError::Restored(other)));
        }
        assert_eq!(read("--restore f --snapshot 9=/f"), Err(OptionsError::Restored("--snapshot")));
    }

    #[test]
    fn disks_and_ports_may_be_several() {
        let options = read("--disk a:ro --kernel k --disk b --vsock 7=/s --vsock 8=t=u").unwrap();
        let disk = |path: &str, is_read_only| Disk { path: path.into(), is_read_only };
        assert_eq!(options.disks, [disk("a", true), disk("b", false)]);
        assert_eq!(options.vsock, BTreeMap::from([(7, "/s".into()), (8, "t=u".into())]));
        for wrong in ["7", "x=/s", "7=/s --vsock 7=/t"] {
            let error = read(&format!("--kernel k --vsock {wrong}")).unwrap_err();
            assert!(matches!(error, OptionsError::Vsock(_)), "{wrong}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(read(""), Err(OptionsError::NoKernel));
        assert_eq!(read("--kernle k"), Err(OptionsError::Unknown("--kernle".to_owned())));
        assert_eq!(read("--kernel"), Err(OptionsError::NoValue("--kernel".to_owned())));
        assert_eq!(read("--kernel k --kernel k"), Err(OptionsError::Twice("--kernel")));
        for wrong in ["0", "256", "x", "-1"] {
            let error = read(&format!("--kernel k --vcpus {wrong}")).unwrap_err();
            assert!(matches!(error, OptionsError::NoNumber { option: "--vcpus", .. }), "{wrong}");
        }
    }
}
