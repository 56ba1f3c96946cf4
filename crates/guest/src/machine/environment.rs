//! Makes the environments in a machine, the action's and one for each service beside it, and has an init in each.
//!
//! ```text
//!   the machine's first process ── fork ──▶ a service's: call its port ─▶ its root ─▶ its user ─▶ the supervisor
//!            │                  └─ fork ──▶ the action's:                 its root ─▶ its user ─▶ the supervisor
//!            └─ waits for the action's end: the machine's
//! ```
//! Each init is the first process of a PID namespace, with mounts, names and messages of its own; the network is everybody's. So
//! the end of one ends what it has started and nothing else. It becomes its user before it does anything that the host asks
//! for: what it starts, packs and unpacks is that user's. What is wrong with one is told by its own channel.

use std::fs::File;
use std::io;
use std::process::ExitCode;

use sealci_guest::accounts::{Account, COMPLAINT, GROUP, PASSWD};
use sealci_guest::wire::Wake;
use sealci_guest::wire::machine::{HOST_CID, service_disk, service_port};

use super::{Machine, network, root};
use crate::failure::{Failure, While};
use crate::places::read_accounts;
use crate::supervisor::Supervisor;
use crate::sys;

/// Whose writing this is, on the scratch disk.
const ACTION: &str = "action";

/// Runs all of them until the action's is over. `port` is the one that was called for the action.
pub fn hold(channel: &File, port: u32, machine: &Machine, wake: &Wake) -> Result<(), Failure> {
    for service in 0..wake.services.len() {
        fork(|| {
            let port = service_port(port, service);
            let channel = sys::machine::call(HOST_CID, port, None)?;
            let ready = enter_service(service, wake);
            supervisor(channel, machine, ready)?.run()
        })?;
    }
    let action = fork(|| {
        let ready = enter(ACTION, &wake.user, wake);
        supervisor(channel.try_clone()?, machine, ready)?.serve()
    })?;
    // A service's end is its own affair.
    while sys::machine::wait_for_child().doing(|| "wait for the action's init".to_owned())? != action {}
    Ok(())
}

/// What `live` returns is the end of the process in which it runs. That has this one's descriptors, of which nothing that it
/// executes gets any.
fn fork(live: impl FnOnce() -> io::Result<ExitCode>) -> Result<i32, Failure> {
    if let Some(pid) = sys::machine::fork_apart().doing(|| "start an init".to_owned())? {
        return Ok(pid);
    }
    let is_over = live().inspect_err(|error| eprintln!("sealci-init: an init could not go on: {error}"));
    std::process::exit(i32::from(is_over.is_err()))
}

fn supervisor(channel: File, machine: &Machine, ready: Result<(), String>) -> io::Result<Supervisor> {
    let machine = machine.clone();
    let machine = match ready {
        Ok(()) => machine,
        Err(trouble) => machine.in_trouble(trouble),
    };
    Ok(Supervisor::new(channel, None)?.of(machine))
}

fn enter_service(service: usize, wake: &Wake) -> Result<(), String> {
    root::mount_lower(&service_disk(service)).map_err(|failure| failure.to_string())?;
    enter(&format!("service-{service}"), &wake.services[service], wake)
}

/// Goes into a root of its own, and becomes who runs there.
fn enter(name: &str, user: &str, wake: &Wake) -> Result<(), String> {
    let told = |failure: Failure| failure.to_string();
    root::enter(name).map_err(told)?;
    root::write_hosts(&wake.host_name, &wake.names).map_err(told)?;
    if let Some(network) = &wake.network {
        network::write_resolvers(network).map_err(told)?;
    }
    let account = find_account(user)?;
    root::give_folders(account.uid, account.gid).map_err(told)?;
    stand_apart_as(&account).map_err(told)
}

fn stand_apart_as(account: &Account) -> Result<(), Failure> {
    crate::stand_apart().doing(|| "become what supervises others".to_owned())?;
    sys::be_spared().doing(|| "be spared when memory runs out".to_owned())?;
    let Account { uid, gid, groups } = account;
    sys::machine::become_user(*uid, *gid, groups).doing(|| format!("become the user {uid}:{gid}"))
}

/// Whom this root knows by that name.
fn find_account(user: &str) -> Result<Account, String> {
    let read = |path| read_accounts(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let [passwd, group] = [PASSWD, GROUP].map(|path| read(path).unwrap_or_default());
    Account::find(user, &passwd, &group).map_err(|error| format!("{COMPLAINT}: {error}"))
}
