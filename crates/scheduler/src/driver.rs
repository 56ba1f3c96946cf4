//! Runs the [`Scheduler`]: one task owns it, feeds it what arrives, and hands out what it decides.
//!
//! The task never waits for a peer. Every stream has a bounded mailbox; one that is full belongs to a peer that does
//! not read, and its stream is ended: when it connects again it is told everything anew. So that no agent can fill a
//! controller's mailbox, agents are not listened to while one is nearly full; a controller that leaves it so for long
//! is cut off. What has arrived meanwhile is taken in together, and placed for once.

use std::collections::HashMap;
use std::time::Duration;

use sealci_proto::{agent, scheduler};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::state::{ControllerId, Ended, EnrolId, EnrolRefused, Input, Output, Scheduler, SessionId};

/// The most inputs taken in from each side before anything is sent.
const BATCH: usize = 256;

/// A controller's mailbox is nearly full when less than one part in so many is free.
const RESERVED_PART: usize = 4;

/// So long agents are held up for a controller that does not empty its mailbox.
const PATIENCE: Duration = Duration::from_secs(10);

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

/// Where arrivals are handed in, and where the driver takes them from.
#[derive(Debug, Clone)]
pub(crate) struct Inboxes {
    pub agents: mpsc::Sender<Arrival>,
    pub controllers: mpsc::Sender<Arrival>,
}

#[derive(Debug)]
pub(crate) struct Arrivals {
    agents: mpsc::Receiver<Arrival>,
    controllers: mpsc::Receiver<Arrival>,
}

/// Makes the ends of both inboxes, each of which holds so many arrivals.
pub(crate) fn inboxes(capacity: usize) -> (Inboxes, Arrivals) {
    let (to_agents, agents) = mpsc::channel(capacity);
    let (to_controllers, controllers) = mpsc::channel(capacity);
    (Inboxes { agents: to_agents, controllers: to_controllers }, Arrivals { agents, controllers })
}

/// A controller whose mailbox is nearly full.
#[derive(Debug)]
struct Congestion {
    controller: ControllerId,
    mailbox: mpsc::Sender<scheduler::scheduler_message::Body>,
    /// Then it is cut off.
    until: Instant,
}

impl Congestion {
    fn reserve(mailbox: &mpsc::Sender<scheduler::scheduler_message::Body>) -> usize {
        mailbox.max_capacity() / RESERVED_PART
    }

    /// Waits until there is room again, or nobody at the other end.
    async fn relieved(mailbox: mpsc::Sender<scheduler::scheduler_message::Body>) {
        // Only the wait matters: the room is given back at once. An error means that nobody is there.
        let _ = mailbox.reserve_many(Self::reserve(&mailbox)).await;
    }
}

/// The one owner of the scheduler.
pub(crate) struct Driver {
    scheduler: Scheduler,
    start: Instant,
    arrivals: Arrivals,
    congestion: Option<Congestion>,
    agents: HashMap<SessionId, Mailbox<agent::scheduler_message::Body>>,
    controllers: HashMap<ControllerId, Mailbox<scheduler::scheduler_message::Body>>,
    enrols: HashMap<EnrolId, oneshot::Sender<Result<(), EnrolRefused>>>,
}

impl Driver {
    pub fn new(scheduler: Scheduler, arrivals: Arrivals) -> Self {
        Self {
            scheduler,
            start: Instant::now(),
            arrivals,
            congestion: None,
            agents: HashMap::new(),
            controllers: HashMap::new(),
            enrols: HashMap::new(),
        }
    }

    /// Runs until it is told to stop; then every stream is ended with the reason.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(BATCH);
        while self.wait(&stop, &mut batch).await {
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

    /// Waits for something to do. False: it is over.
    async fn wait(&mut self, stop: &CancellationToken, batch: &mut Vec<Arrival>) -> bool {
        self.note_congestion();
        let deadline = self.scheduler.deadline().map(|deadline| self.start + deadline);
        let listens = self.congestion.is_none();
        let (mailbox, patience) = match &self.congestion {
            Some(congestion) => (Some(congestion.mailbox.clone()), Some(congestion.until)),
            None => (None, None),
        };
        tokio::select! {
            () = stop.cancelled() => return false,
            first = self.arrivals.controllers.recv() => match first {
                Some(first) => batch.push(first),
                None => return false,
            },
            first = self.arrivals.agents.recv(), if listens => match first {
                Some(first) => batch.push(first),
                None => return false,
            },
            () = relieved(mailbox) => {}
            () = until(patience) => self.cut_off_congested(),
            () = until(deadline) => {}
        }
        batch.extend(std::iter::from_fn(|| self.arrivals.controllers.try_recv().ok()).take(BATCH));
        if listens {
            batch.extend(std::iter::from_fn(|| self.arrivals.agents.try_recv().ok()).take(BATCH));
        }
        true
    }

    fn note_congestion(&mut self) {
        let is_nearly_full = |mailbox: &mpsc::Sender<_>| mailbox.capacity() < Congestion::reserve(mailbox);
        if self.congestion.as_ref().is_some_and(|congestion| {
            is_nearly_full(&congestion.mailbox) && self.controllers.contains_key(&congestion.controller)
        }) {
            return;
        }
        self.congestion = self.controllers.iter().find(|(_, mailbox)| is_nearly_full(&mailbox.messages)).map(
            |(controller, mailbox)| Congestion {
                controller: *controller,
                mailbox: mailbox.messages.clone(),
                until: Instant::now() + PATIENCE,
            },
        );
    }

    fn cut_off_congested(&mut self) {
        if let Some(congestion) = self.congestion.take() {
            self.cut_off_controller(self.now(), congestion.controller);
        }
    }

    fn cut_off_controller(&mut self, now: Duration, controller: ControllerId) {
        if let Some(mailbox) = self.controllers.remove(&controller) {
            // Whoever is gone does not read either, which its stream will say by itself.
            if !mailbox.messages.is_closed() {
                warn!(controller.stream = controller.0, "a controller does not read: its stream is ended");
            }
            mailbox.end(Ended::Unread);
        }
        self.scheduler.handle(now, Input::ControllerGone { controller });
    }

    fn cut_off_agent(&mut self, now: Duration, session: SessionId) {
        if let Some(mailbox) = self.agents.remove(&session) {
            if !mailbox.messages.is_closed() {
                warn!(session = session.0, "an agent does not read: its stream is ended");
            }
            mailbox.end(Ended::Unread);
        }
        self.scheduler.handle(now, Input::AgentGone { session });
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
                self.cut_off_agent(now, session);
                return true;
            }
            Output::ToController { controller, message } => {
                let Some(mailbox) = self.controllers.get(&controller) else { return false };
                if mailbox.post(message) {
                    return false;
                }
                self.cut_off_controller(now, controller);
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

async fn relieved(mailbox: Option<mpsc::Sender<scheduler::scheduler_message::Body>>) {
    match mailbox {
        Some(mailbox) => Congestion::relieved(mailbox).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Settings;

    type Answered = oneshot::Receiver<Result<(), EnrolRefused>>;

    struct Running {
        inboxes: Inboxes,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    const CONTROLLER: ControllerId = ControllerId(1);

    impl Running {
        fn start() -> Self {
            let (inboxes, arrivals) = inboxes(64);
            let stop = CancellationToken::new();
            let driver = Driver::new(Scheduler::new(Settings::default(), 1), arrivals);
            let task = tokio::spawn(driver.run(stop.clone()));
            Self { inboxes, stop, task }
        }

        /// A controller that was sent `Welcome` and so many answers, and read nothing.
        async fn controller(
            &self,
            capacity: usize,
            answers: u64,
        ) -> Mail<scheduler::scheduler_message::Body> {
            let (mailbox, mail) = mailbox(capacity);
            let hello = scheduler::Hello {
                protocol_min: 1,
                protocol_max: 1,
                replica_id: "01890000-0000-7000-8000-000000000001".into(),
            };
            let arrived = Input::ControllerArrived { controller: CONTROLLER, hello };
            self.inboxes.controllers.send(Arrival::Controller(CONTROLLER, mailbox, arrived)).await.unwrap();
            for request in 0..answers {
                let question = scheduler::WhyQuestion { request, attempt: None };
                let message = scheduler::controller_message::Body::WhyQuestion(question);
                let input = Input::FromController { controller: CONTROLLER, message };
                self.inboxes.controllers.send(Arrival::Input(input)).await.unwrap();
            }
            mail
        }

        async fn enrol(&self, request: u64) -> Answered {
            let (answer, answered) = oneshot::channel();
            let request = EnrolId(request);
            let input = Input::Enrol { request, enrol: agent::EnrolRequest::default() };
            self.inboxes.agents.send(Arrival::Enrol(request, answer, input)).await.unwrap();
            answered
        }

        async fn stop(self) {
            self.stop.cancel();
            self.task.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_controller_whose_mailbox_is_full_is_cut_off_and_the_driver_goes_on() {
        let driver = Running::start();
        let mut slow = driver.controller(2, 4).await;
        assert_eq!((&mut slow.ended).await, Ok(Ended::Unread));
        let answered = driver.enrol(1).await;
        assert_eq!(answered.await, Ok(Err(EnrolRefused::NoController)), "it is gone for the scheduler, too");
        driver.stop().await;
    }

    #[tokio::test(start_paused = true)]
    async fn agents_wait_for_a_controller_that_reads_slowly() {
        let driver = Running::start();
        let mut slow = driver.controller(8, 6).await;
        // Time stands still for as long as anyone has something to do: then the mailbox is nearly full.
        tokio::time::sleep(PATIENCE / 2).await;
        let _answered = driver.enrol(1).await;
        tokio::time::sleep(PATIENCE / 4).await;
        assert_eq!(slow.messages.len(), 7, "the agent is not listened to");
        slow.messages.recv().await.unwrap();
        let enrolment = async {
            while !matches!(
                slow.messages.recv().await,
                Some(scheduler::scheduler_message::Body::EnrolQuestion(_))
            ) {}
        };
        enrolment.await;
        driver.stop().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_controller_that_holds_up_the_agents_is_cut_off() {
        let driver = Running::start();
        let mut stuck = driver.controller(8, 6).await;
        tokio::time::sleep(PATIENCE / 2).await;
        let answered = driver.enrol(1).await;
        assert_eq!((&mut stuck.ended).await, Ok(Ended::Unread));
        assert_eq!(answered.await, Ok(Err(EnrolRefused::NoController)));
        driver.stop().await;
    }
}
