//! Runs the [`Scheduler`]: one task owns it, feeds it what arrives, and hands out what it decides.
//!
//! The task never waits for a peer. Every stream has a bounded mailbox; one that is full belongs to a peer that does
//! not read, and its stream is ended: when it connects again it is told everything anew. What has arrived meanwhile is
//! taken in together, and placed for once.

use std::collections::HashMap;
use std::time::Duration;

use sealci_proto::{agent, scheduler};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::state::{ControllerId, Ended, EnrolId, EnrolRefused, Input, Output, Scheduler, SessionId};

/// The most inputs taken in before anything is sent.
const BATCH: usize = 256;

/// The driver's end of a stream to a peer.
#[derive(Debug)]
pub(crate) struct Mailbox<M> {
    messages: mpsc::Sender<M>,
    ended: Option<oneshot::Sender<Ended>>,
}

/// The peer's end of its stream.
#[derive(Debug)]
pub(crate) struct Mail<M> {
    pub messages: mpsc::Receiver<M>,
    /// Why the stream was ended; without a word when the driver is gone.
    pub ended: oneshot::Receiver<Ended>,
}

/// Makes the two ends of a stream that holds so many messages.
pub(crate) fn mailbox<M>(capacity: usize) -> (Mailbox<M>, Mail<M>) {
    let (sender, messages) = mpsc::channel(capacity);
    let (end, ended) = oneshot::channel();
    (Mailbox { messages: sender, ended: Some(end) }, Mail { messages, ended })
}

impl<M> Mailbox<M> {
    /// False: there is no room, or nobody at the other end.
    fn post(&self, message: M) -> bool {
        self.messages.try_send(message).is_ok()
    }

    fn end(mut self, ended: Ended) {
        if let Some(end) = self.ended.take() {
            // Nobody at the other end: then nobody needs to be told.
            let _ = end.send(ended);
        }
    }
}

/// What reaches the driver.
#[derive(Debug)]
pub(crate) enum Arrival {
    Agent(SessionId, Mailbox<agent::scheduler_message::Body>, Input),
    Controller(ControllerId, Mailbox<scheduler::scheduler_message::Body>, Input),
    Enrol(EnrolId, oneshot::Sender<Result<(), EnrolRefused>>, Input),
    Input(Input),
}

/// The one owner of the scheduler.
pub(crate) struct Driver {
    scheduler: Scheduler,
    start: Instant,
    inbox: mpsc::Receiver<Arrival>,
    agents: HashMap<SessionId, Mailbox<agent::scheduler_message::Body>>,
    controllers: HashMap<ControllerId, Mailbox<scheduler::scheduler_message::Body>>,
    enrols: HashMap<EnrolId, oneshot::Sender<Result<(), EnrolRefused>>>,
}

impl Driver {
    pub fn new(scheduler: Scheduler, inbox: mpsc::Receiver<Arrival>) -> Self {
        Self {
            scheduler,
            start: Instant::now(),
            inbox,
            agents: HashMap::new(),
            controllers: HashMap::new(),
            enrols: HashMap::new(),
        }
    }

    /// Runs until it is told to stop; then every stream is ended with the reason.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let deadline = self.scheduler.deadline().map(|deadline| self.start + deadline);
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                taken = self.inbox.recv_many(&mut batch, BATCH) => {
                    if taken == 0 {
                        break;
                    }
                }
                () = until(deadline) => {}
            }
            let now = self.now();
            for arrival in batch.drain(..) {
                self.take(now, arrival);
            }
            self.scheduler.settle(now);
            self.hand_out(now);
            // The streams shall get to send what they were handed, also where all share one thread.
            tokio::task::yield_now().await;
        }
        self.end_all();
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn take(&mut self, now: Duration, arrival: Arrival) {
        let input = match arrival {
            Arrival::Agent(session, mailbox, input) => {
                self.agents.insert(session, mailbox);
                input
            }
            Arrival::Controller(controller, mailbox, input) => {
                self.controllers.insert(controller, mailbox);
                input
            }
            Arrival::Enrol(request, answer, input) => {
                self.enrols.insert(request, answer);
                input
            }
            Arrival::Input(input) => input,
        };
        match &input {
            Input::AgentGone { session } => drop(self.agents.remove(session)),
            Input::ControllerGone { controller } => drop(self.controllers.remove(controller)),
            Input::EnrolAbandoned { request } => drop(self.enrols.remove(request)),
            _ => {}
        }
        self.scheduler.handle(now, input);
    }

    /// Ending a stream may lead to more being said to others, so this goes on until nothing is left to say.
    fn hand_out(&mut self, now: Duration) {
        loop {
            let outputs = self.scheduler.take_outputs();
            if outputs.is_empty() {
                return;
            }
            let mut ended_one = false;
            for output in outputs {
                ended_one |= self.hand_out_one(now, output);
            }
            if ended_one {
                self.scheduler.settle(now);
            }
        }
    }

    /// Whether a stream had to be ended because its peer does not read.
    fn hand_out_one(&mut self, now: Duration, output: Output) -> bool {
        match output {
            Output::ToAgent { session, message } => {
                let Some(mailbox) = self.agents.get(&session) else { return false };
                if mailbox.post(message) {
                    return false;
                }
                if let Some(mailbox) = self.agents.remove(&session) {
                    warn!(session = session.0, "an agent does not read: its stream is ended");
                    mailbox.end(Ended::Unread);
                }
                self.scheduler.handle(now, Input::AgentGone { session });
                return true;
            }
            Output::ToController { controller, message } => {
                let Some(mailbox) = self.controllers.get(&controller) else { return false };
                if mailbox.post(message) {
                    return false;
                }
                if let Some(mailbox) = self.controllers.remove(&controller) {
                    warn!(
                        controller.stream = controller.0,
                        "a controller does not read: its stream is ended"
                    );
                    mailbox.end(Ended::Unread);
                }
                self.scheduler.handle(now, Input::ControllerGone { controller });
                return true;
            }
            Output::EndAgent { session, ended } => {
                debug!(session = session.0, reason = %ended, "an agent's stream is ended");
                if let Some(mailbox) = self.agents.remove(&session) {
                    mailbox.end(ended);
                }
            }
            Output::EndController { controller, ended } => {
                debug!(controller.stream = controller.0, reason = %ended, "a controller's stream is ended");
                if let Some(mailbox) = self.controllers.remove(&controller) {
                    mailbox.end(ended);
                }
            }
            Output::Enrolled { request, result } => {
                if let Some(answer) = self.enrols.remove(&request) {
                    // Whoever asked may have gone meanwhile.
                    let _ = answer.send(result);
                }
            }
        }
        false
    }

    fn end_all(&mut self) {
        for (_, mailbox) in self.agents.drain() {
            mailbox.end(Ended::ShuttingDown);
        }
        for (_, mailbox) in self.controllers.drain() {
            mailbox.end(Ended::ShuttingDown);
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Settings;

    #[tokio::test]
    async fn a_controller_that_does_not_read_is_cut_off_and_the_driver_goes_on() {
        let (inbox, arrivals) = mpsc::channel(64);
        let stop = CancellationToken::new();
        let driver = Driver::new(Scheduler::new(Settings::default(), 1), arrivals);
        let driver = tokio::spawn(driver.run(stop.clone()));

        let (mailbox, mut slow) = mailbox(2);
        let hello = scheduler::Hello {
            protocol_min: 1,
            protocol_max: 1,
            replica_id: "01890000-0000-7000-8000-000000000001".into(),
        };
        let controller = ControllerId(1);
        let arrived = Input::ControllerArrived { controller, hello };
        inbox.send(Arrival::Controller(controller, mailbox, arrived)).await.unwrap();
        for request in 0..4 {
            let question = scheduler::WhyQuestion { request, attempt: None };
            let message = scheduler::controller_message::Body::WhyQuestion(question);
            inbox.send(Arrival::Input(Input::FromController { controller, message })).await.unwrap();
        }
        assert_eq!((&mut slow.ended).await, Ok(Ended::Unread));

        let (answer, answered) = oneshot::channel();
        let input = Input::Enrol { request: EnrolId(1), enrol: agent::EnrolRequest::default() };
        inbox.send(Arrival::Enrol(EnrolId(1), answer, input)).await.unwrap();
        assert_eq!(answered.await, Ok(Err(EnrolRefused::NoController)), "it is gone for the scheduler, too");
        stop.cancel();
        driver.await.unwrap();
    }
}
