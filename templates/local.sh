#!/bin/bash
# The job of one attempt where there is no batch system. A copy of this file in the campaign's templates/ may be changed
# freely.
# flctl replaces each {{name}} by a value that is quoted already (put no quotes around it); $ stays the shell's.

umask 077
set -u
cd {{run}} || exit 1
seal_python=$(command -v {{seal_python}}) || { echo error: there is no {{seal_python}} here; exit 1; }
nonce=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')   # tells this start from any other copy of the same job
child='' caught=''

# The last act: done.json says how it ended. Only the attempt's owner may write it, and only once.
record() {
  (
    trap '' TERM USR1
    set +u
    exec "$seal_python" -I {{payload}}/seal.py finish \
      --run {{run}} --nonce "$nonce" --status "$1" ${caught:+--signal "$caught"} --sign {{signing_key}}
  )
}

tell() { [ ! -s program.pid ] || kill -"$1" "$(cat program.pid)" 2>/dev/null; }

# Cancelled, preempted or out of time: SIGKILL may follow within seconds, so the record comes first.
on_end() {
  caught=TERM
  tell TERM
  record 143
}

# The walltime is nearly over: the program saves and ends by itself, and what it saved counts. The file FLCTL_STOP says
# it to every rank; a launcher may pass the signal on (srun, mpiexec) or not (torchrun).
on_warning() {
  : >stop
  tell USR1
}

trap on_warning USR1
trap on_end TERM
trap 'record $?' EXIT

# Take the attempt, or stop here: exit status 75 says that it belongs to another copy or was revoked.
exports=$(
  "$seal_python" -I {{payload}}/seal.py start --run {{run}} --workdir {{workdir}} --data {{data}} \
    --walltime {{walltime_seconds}} --job-id "${FLCTL_JOB_ID:-}" --nonce "$nonce"
)
status=$?
[ "$status" -ne 75 ] || trap - EXIT
[ "$status" -eq 0 ] || exit "$status"
[ -z "$caught" ] || exit 143
eval "$exports"   # FLCTL_MODEL, FLCTL_OUT, FLCTL_DATA, FLCTL_ORDER, ...

# What the program needs at this site, then the program. It is a shell of its own, so nothing in it reaches the record.
# USR1 is ignored until the program asks for it: one that knows nothing of it is not killed by it.
program() {
  trap '' USR1
  echo "$BASHPID" >program.pid
  set +u
  export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
  {{environment}}
  exec {{launch}} {{container}} {{python}} {{trainer}}
}

# In the background, since bash runs no trap while it waits for a program in the foreground. The program's status goes
# through a file: `wait` tells another one when a signal arrives just as the program ends.
keep() {
  trap : TERM USR1
  ( program )
  echo $? >program.status
}
keep &
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
exit "$(cat program.status || echo 1)"
