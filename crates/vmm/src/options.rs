//! Reads the command line of `sealci-vmm`.

use std::collections::BTreeMap;
use std::num::NonZeroU8;
use std::path::PathBuf;

use thiserror::Error;

pub const USAGE: &str = "\
sealci-vmm: runs a Linux guest behind hardware virtualization (KVM)

usage: sealci-vmm --kernel FILE [OPTION…]

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
  --extract FILE              runs no guest, but writes the vmlinux that is in the bzImage to a file, or with - to the one
                              that is standard output: guests need not unpack it then, and have it at an address that
                              is no secret
  --version                   says which version this is

Disks and ports may be several; the guest's own CID is 3. It has a source of random
numbers, and a balloon by which it gives back what memory it does not use.
What runs the guest is a process of its own that can reach nothing: it has an empty root,
no network, no other process and no capability, and is nobody; started by a user it needs
user namespaces for that. Root's sockets must let everybody connect (mode 0666).
It ends with 0 when the guest has reset the machine or turned it off.";

const MEMORY_MEBIBYTES: u64 = 256;

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    pub kernel: PathBuf,
    pub initramfs: Option<PathBuf>,
    pub command_line_extra: String,
    pub memory_mebibytes: u64,
    pub vcpus: NonZeroU8,
    pub serial: Option<PathBuf>,
    pub disks: Vec<Disk>,
    /// By port.
    pub vsock: BTreeMap<u32, PathBuf>,
    pub tap: Option<String>,
    pub extract: Option<PathBuf>,
    pub ends_with_stdin: bool,
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
    #[error("the option --kernel is missing")]
    NoKernel,
}

impl Options {
    /// Reads all arguments but the program's name.
    pub fn read(arguments: impl IntoIterator<Item = String>) -> Result<Self, OptionsError> {
        let (mut kernel, mut initramfs, mut serial) = (None, None, None);
        let (mut extra, mut memory, mut vcpus, mut tap, mut extract) = (None, None, None, None, None);
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
                _ => return Err(OptionsError::Unknown(name)),
            };
            if place.replace(value()?).is_some() {
                return Err(OptionsError::Twice(option));
            }
        }
        Ok(Self {
            kernel: kernel.ok_or(OptionsError::NoKernel)?.into(),
            initramfs: initramfs.map(PathBuf::from),
            command_line_extra: extra.unwrap_or_default(),
            memory_mebibytes: number("--memory-mib", memory)?.unwrap_or(MEMORY_MEBIBYTES),
            vcpus: number("--vcpus", vcpus)?.unwrap_or(NonZeroU8::MIN),
            serial: serial.map(PathBuf::from),
            disks,
            vsock,
            tap,
            extract: extract.map(PathBuf::from),
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
        assert_eq!((plain.memory_mebibytes, plain.vcpus.get(), plain.serial), (256, 1, None));
        assert_eq!((plain.tap, read("--kernel k --tap t0").unwrap().tap), (None, Some("t0".to_owned())));
        let all = read(
            "--vcpus 4 --end-with-stdin --kernel k --memory-mib 6144 --initramfs i --serial - --command-line-extra x",
        );
        let all = all.unwrap();
        assert!(all.ends_with_stdin && !plain.ends_with_stdin);
        assert_eq!((all.memory_mebibytes, all.vcpus.get(), all.serial), (6144, 4, Some("-".into())));
        assert_eq!((all.initramfs, all.command_line_extra.as_str()), (Some("i".into()), "x"));
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
