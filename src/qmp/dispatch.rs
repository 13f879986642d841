//! The registry of commands and events: name, type of the arguments, type of the answer, function.
//!
//! Arguments are read and answers written through their declared types, so introspection (which is made from the
//! same types) tells the truth and no command sees an argument that it did not declare.
//!
//! ```text
//! {"driver": …} ─► from_json::<A> ─► f(call, A) ─► Result<R, Error> ─► R::write ─► {"return": …}
//! ```

use ringblock_drivers::options::{Qapi, Type, Value, from_json};
use ringblock_engine::error::{Error, ErrorClass};
use std::collections::BTreeMap;

type Run<C> = Box<dyn Fn(&Call<'_, C>, &Value) -> Result<Value, Error> + Send + Sync>;

/// What a command sees of its surroundings.
pub struct Call<'a, C> {
    /// The program's own state.
    pub context: &'a C,
    /// All commands, for introspection.
    pub registry: &'a Registry<C>,
}

/// A command.
pub struct Command<C> {
    /// The type of its arguments.
    pub args: Type,
    /// The type of its answer.
    pub ret: Type,
    /// Marks for introspection: "unstable", "deprecated".
    pub features: &'static [&'static str],
    run: Run<C>,
}

/// All commands and events of a program.
pub struct Registry<C> {
    commands: BTreeMap<&'static str, Command<C>>,
    events: BTreeMap<&'static str, Type>,
}

impl<C> Default for Registry<C> {
    fn default() -> Self {
        Registry { commands: BTreeMap::new(), events: BTreeMap::new() }
    }
}

impl<C> Registry<C> {
    /// Adds a command. A second one of the same name replaces the first.
    pub fn command<A: Qapi, R: Qapi>(
        &mut self,
        name: &'static str,
        f: impl Fn(&Call<'_, C>, A) -> Result<R, Error> + Send + Sync + 'static,
    ) {
        self.marked_command(name, &[], f);
    }

    /// Adds a command with features.
    pub fn marked_command<A: Qapi, R: Qapi>(
        &mut self,
        name: &'static str,
        features: &'static [&'static str],
        f: impl Fn(&Call<'_, C>, A) -> Result<R, Error> + Send + Sync + 'static,
    ) {
        let run: Run<C> = Box::new(move |call, args| f(call, from_json::<A>(args)?).map(|r| r.write()));
        self.commands.insert(name, Command { args: A::ty(), ret: R::ty(), features, run });
    }

    /// Declares an event.
    pub fn event<T: Qapi>(&mut self, name: &'static str) {
        self.events.insert(name, T::ty());
    }

    /// All commands by name.
    pub fn commands(&self) -> impl Iterator<Item = (&'static str, &Command<C>)> {
        self.commands.iter().map(|(n, c)| (*n, c))
    }

    /// All events by name, with the type of their data.
    pub fn events(&self) -> impl Iterator<Item = (&'static str, Type)> {
        self.events.iter().map(|(n, t)| (*n, *t))
    }

    /// Whether there is such a command.
    pub fn has(&self, name: &str) -> bool {
        self.commands.contains_key(name)
    }

    /// Runs a command. `CommandNotFound` if there is none of that name.
    pub fn run(&self, context: &C, name: &str, args: &Value) -> Result<Value, Error> {
        let Some(command) = self.commands.get(name) else {
            return Err(not_found(name));
        };
        (command.run)(&Call { context, registry: self }, args)
    }
}

/// "The command X has not been found".
pub(super) fn not_found(name: &str) -> Error {
    Error::invalid(format!("The command {name} has not been found")).with_class(ErrorClass::CommandNotFound)
}
