//! Serves repositories by ssh for tests: OpenSSH's own server, one process for each connection, with keys of its own.
//!
//! Nothing of the machine's configuration is used or changed. The test listens and hands each connection over, as inetd
//! would, so there is no port that somebody else could take in between.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::host::is_root;
use crate::skip;

/// A server on a free port of the loopback. It ends when dropped.
pub struct Sshd {
    folder: PathBuf,
    port: u16,
    user: String,
    ends: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl Sshd {
    /// Starts one with its files in the new folder; none, said loudly, where the programs are missing.
    pub fn start(folder: PathBuf, test: &str) -> Option<Self> {
        let Some(program) =
            ["/usr/sbin/sshd", "/usr/bin/sshd"].map(Path::new).into_iter().find(|p| p.exists())
        else {
            skip("ssh", test, "there is no sshd (Debian package openssh-server)");
            return None;
        };
        fs::create_dir_all(&folder).expect("a folder can be made");
        if is_root() {
            // Where the server shuts its unprivileged half in; a system's own service makes it at its start.
            fs::create_dir_all("/run/sshd").expect("root may make it");
        }
        let configuration = format!(
            "HostKey {0}/host.key\nAuthorizedKeysFile {0}/authorized\nPidFile none\nStrictModes no\nUsePAM no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n",
            folder.display()
        );
        fs::write(folder.join("config"), configuration).expect("the configuration can be written");
        make_key(&folder.join("host.key"));
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let ends = Arc::new(AtomicBool::new(false));
        let mut command = Command::new(program);
        command.args(["-i", "-e", "-f"]).arg(folder.join("config"));
        let log = folder.join("log");
        let accepting = std::thread::spawn({
            let ends = Arc::clone(&ends);
            move || accept(&listener, &mut command, &log, &ends)
        });
        let output = Command::new("id").arg("-un").output().expect("id can be run");
        let user = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        Some(Self { folder, port, user, ends, accepting: Some(accepting) })
    }

    /// The address of a repository on this machine's disk.
    pub fn url(&self, repository: &Path) -> String {
        format!("ssh://{}@127.0.0.1:{}{}", self.user, self.port, repository.display())
    }

    /// Makes a key pair and gives the private one's path; [`Sshd::let_in`] opens the door to it.
    pub fn new_key(&self, name: &str) -> PathBuf {
        let path = self.folder.join(name);
        make_key(&path);
        path
    }

    /// From now on this key opens, and no other.
    pub fn let_in(&self, key: &Path) {
        let public = fs::read_to_string(key.with_extension("pub")).expect("it was made");
        let line = format!("restrict {public}");
        fs::write(self.folder.join("authorized"), line).expect("it can be written");
    }

    /// From now on the server has another key of its own.
    pub fn change_host_key(&self) {
        for name in ["host.key", "host.pub"] {
            fs::remove_file(self.folder.join(name)).expect("there was one");
        }
        make_key(&self.folder.join("host.key"));
    }

    /// What stands in `known_hosts` for it.
    pub fn known_host(&self) -> String {
        let public = fs::read_to_string(self.folder.join("host.pub")).expect("it was made");
        format!("[127.0.0.1]:{} {public}", self.port)
    }

    /// What the server had to say.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        // Wakes it.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        if std::thread::panicking() {
            eprintln!("--- sshd\n{}", self.log());
        }
    }
}

fn accept(listener: &TcpListener, command: &mut Command, log: &Path, ends: &AtomicBool) {
    let mut children: Vec<Child> = Vec::new();
    for stream in listener.incoming() {
        if ends.load(Ordering::SeqCst) {
            break;
        }
        children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        let stream: OwnedFd = stream.expect("a connection can be accepted").into();
        let output = stream.try_clone().expect("a descriptor can be duplicated");
        let errors =
            fs::OpenOptions::new().append(true).create(true).open(log).expect("a log can be written");
        command.stdin(stream).stdout(output).stderr(errors);
        children.push(command.spawn().expect("sshd can be run"));
        // The connection is the child's alone now.
        command.stdin(Stdio::null()).stdout(Stdio::null());
    }
    for mut child in children {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Writes `NAME.key` or `NAME`, and beside it `NAME.pub`.
fn make_key(path: &Path) {
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"])
        .arg(path)
        .stdin(Stdio::null())
        .status()
        .expect("ssh-keygen can be run");
    assert!(made.success());
    // `host.key.pub` becomes `host.pub`.
    let mut public = path.as_os_str().to_owned();
    public.push(".pub");
    fs::rename(public, path.with_extension("pub")).expect("both are in one folder");
}
