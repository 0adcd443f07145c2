//! Locks by name: one at a time for each of them, and no record of a name that nobody uses.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio::sync::Notify;

/// The names that are in use, and where those wait who want the same.
#[derive(Default)]
pub struct Turns(RefCell<BTreeMap<String, Rc<Notify>>>);

/// Somebody's turn at a name, until it is dropped.
pub struct Turn<'a> {
    turns: &'a Turns,
    name: String,
}

impl Turns {
    /// Waits until nobody else is at this name.
    pub async fn take(&self, name: &str) -> Turn<'_> {
        loop {
            let present = self.0.borrow().get(name).cloned();
            let Some(ended) = present else { break };
            ended.notified().await;
        }
        self.0.borrow_mut().insert(name.to_owned(), Rc::default());
        Turn { turns: self, name: name.to_owned() }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(ended) = self.turns.0.borrow_mut().remove(&self.name) {
            // All of them look again; the first to do so has the next turn.
            ended.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn a_name_is_one_users_at_a_time_and_others_are_free() {
        let turns = Turns::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut first = pin!(turns.take("a"));
        let Poll::Ready(turn) = first.as_mut().poll(&mut context) else { panic!("it is free") };
        let mut second = pin!(turns.take("a"));
        let mut third = pin!(turns.take("a"));
        assert!(second.as_mut().poll(&mut context).is_pending());
        assert!(third.as_mut().poll(&mut context).is_pending());
        assert!(pin!(turns.take("b")).poll(&mut context).is_ready());
        drop(turn);
        let Poll::Ready(turn) = second.as_mut().poll(&mut context) else { panic!("its turn") };
        assert!(third.as_mut().poll(&mut context).is_pending());
        drop(turn);
        assert!(third.as_mut().poll(&mut context).is_ready());
        assert!(turns.0.borrow().is_empty());
    }
}
