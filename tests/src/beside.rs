//! Starts what a test of faults has beside the four services: more agents, another controller, and signals to any of them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Certificates, Installation, Part, Process, binary, eventually, host};

impl Installation {
    /// The folder of an agent beside the first.
    pub fn data_of(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("beside-{name}"))
    }

    /// Starts another agent, on the folder of its name.
    pub fn start_beside(&mut self, name: &str, more: &[&str]) {
        self.starts += 1;
        let log = self.folder.path().join(format!("{:02}-agent-{name}.log", self.starts));
        let mut command = Command::new(binary());
        command.arg("agent").arg("--data").arg(self.data_of(name)).args(self.agent_arguments(name));
        command.arg("--enrolment-token-file").arg(self.data().join("enrolment.token"));
        command.args(["--allow-file", "--allow-http", "--allow-local-addresses"]).args(more);
        if let Some((_, certificates)) = &self.tls {
            command.arg("--ca").arg(&certificates.authority);
        }
        command.envs(&self.environment);
        self.beside.insert(name.to_owned(), Process::spawn(command, log));
    }

    /// Starts another controller of the same database, with a data folder of its own and the first one's secrets; where it
    /// answers.
    pub fn start_controller_beside(&mut self, name: &str, more: &[&str]) -> String {
        let secret = |file: &str| self.data().join(file).display().to_string();
        let announce = self.data_of(name).with_extension("address");
        let _ = std::fs::remove_file(&announce);
        let mut command = Command::new(binary());
        command.arg("controller").arg("--data").arg(self.data_of(name)).args(["--listen", "127.0.0.1:0"]);
        command.args(["--scheduler", self.url(Part::Scheduler)]).arg("--announce").arg(&announce);
        command.args(["--cluster-secret-file", &secret("cluster.secret")]);
        command.args(["--enrolment-token-file", &secret("enrolment.token")]);
        command.args(["--api-token", &format!("admin={}", secret("admin.token"))]);
        command.arg("--objects").arg(self.data().join("objects"));
        command.args(["--allow-file", "--allow-http", "--allow-local-addresses"]).args(more);
        self.run_beside(name, command);
        eventually("the other controller to announce itself", || {
            std::fs::read_to_string(&announce).ok().map(|line| line.trim().to_owned())
        })
    }

    /// What a command line prints with `--json` of another controller; null where it fails.
    pub fn json_of(&self, server: &str, arguments: &[&str]) -> serde_json::Value {
        let token = std::fs::read_to_string(self.data().join("admin.token")).unwrap_or_default();
        let mut command = self.command(&[arguments, &["--json"]].concat());
        let output = command.env("SEALCI_SERVER", server).env("SEALCI_TOKEN", token.trim()).output();
        serde_json::from_slice(&output.expect("the binary can be run").stdout).unwrap_or_default()
    }

    /// Runs any program beside the services; it ends with them.
    pub fn run_beside(&mut self, name: &str, command: Command) {
        self.starts += 1;
        let log = self.folder.path().join(format!("{:02}-{name}.log", self.starts));
        self.beside.insert(name.to_owned(), Process::spawn(command, log));
    }

    pub fn kill_beside(&mut self, name: &str) {
        self.beside.get_mut(name).expect("it was started").kill();
    }

    pub fn pid_beside(&self, name: &str) -> u32 {
        self.beside[name].child.id()
    }

    pub fn log_beside(&self, name: &str) -> String {
        std::fs::read_to_string(&self.beside[name].log).expect("a log can be read")
    }

    /// Waits until so many agents take work.
    pub fn wait_for_agents(&self, count: usize) {
        eventually(&format!("{count} agents that take work"), || {
            let agents = self.json(&["agent", "list"]);
            let accepting = agents.as_array()?.iter().filter(|agent| agent["accepting"] == true);
            (accepting.count() == count).then_some(())
        });
    }

    /// Has all services listen on this address, behind TLS. Before they are started.
    pub fn listen_at(&mut self, address: std::net::IpAddr) {
        let certificates = Certificates::make(&self.scratch("certificates"), address);
        self.tls = Some((address, certificates));
    }

    /// Sends a service a signal by its name.
    pub fn signal(&self, part: Part, name: &str) {
        signal(self.pid(part), name);
    }

    /// Whether a service has ended by itself.
    pub fn has_ended(&mut self, part: Part) -> Option<std::process::ExitStatus> {
        let process = self.processes.get_mut(&part).expect("it was started");
        process.child.try_wait().expect("a child can be asked")
    }

    /// Removes what the agents beside leave of control groups.
    pub(crate) fn remove_groups_beside(&self) {
        for name in self.beside.keys() {
            host::remove_cgroups(&self.data_of(name).join("agent"));
        }
    }
}

/// Sends a process a signal by its name, `STOP` or `TERM`.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args(["-s", name, &pid.to_string()]).status().expect("kill can be run");
    assert!(status.success(), "no {name} for {pid}");
}

/// The same command with words before it, which must end by executing the rest: then its process id stays.
pub(crate) fn under(prefix: Option<&Vec<String>>, command: Command) -> Command {
    let Some((first, rest)) = prefix.and_then(|prefix| prefix.split_first()) else { return command };
    let mut under = Command::new(first);
    under.args(rest).arg(command.get_program()).args(command.get_args());
    under
}

/// A folder on a small disk of its own, which goes with this.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts a tmpfs of so many MiB; root only.
    pub fn mount(folder: &Path, mebibytes: u32) -> Self {
        std::fs::create_dir_all(folder).expect("a folder can be made");
        run("mount", &["-t", "tmpfs", "-o", &format!("size={mebibytes}m"), "tmpfs"], folder);
        Self(folder.to_owned())
    }

    /// Puts another folder at this place, on its own disk.
    pub fn bind(from: &Path, to: &Path) -> Self {
        std::fs::create_dir_all(from)
            .and_then(|()| std::fs::create_dir_all(to))
            .expect("folders can be made");
        run("mount", &["--bind", &from.display().to_string()], to);
        Self(to.to_owned())
    }

    pub fn resize(&self, mebibytes: u32) {
        run("mount", &["-o", &format!("remount,size={mebibytes}m")], &self.0);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Whoever still has a file open on it keeps it until they close that.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn run(program: &str, arguments: &[&str], last: &Path) {
    let output = Command::new(program).args(arguments).arg(last).output().expect("it can be run");
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}
