#!/bin/bash
# The job of one attempt where there is no batch system. A copy of this file in the campaign's templates/ may be changed
# freely.
# flctl replaces each {{name}} by a value that is quoted already (put no quotes around it); $ stays the shell's.

umask 077
set -u
cd @ROOT@/pisa/work/camp-719fd56a/runs/0001-1 || exit 1
seal_python=$(command -v @PYTHON@) || { echo error: there is no @PYTHON@ here; exit 1; }
nonce=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')   # tells this start from any other copy of the same job
child='' caught=''

# The last act: done.json says how it ended. Only the attempt's owner may write it, and only once.
record() {
  (
    trap '' TERM USR1
    exec "$seal_python" -I @ROOT@/pisa/work/camp-719fd56a/payload/609afc80b0aa08577033bcbc65b10e0d0b55157a18ffe25202b574748620cc18/seal.py finish \
      --run @ROOT@/pisa/work/camp-719fd56a/runs/0001-1 --nonce "$nonce" --status "$1" ${caught:+--signal "$caught"}
  )
}

tell() { [ ! -s program.pid ] || kill -"$1" "$(cat program.pid)" 2>/dev/null; }

# Cancelled, preempted or out of time: SIGKILL may follow within seconds, so the record comes first.
on_end() {
  caught=TERM
  tell TERM
  record 143
}

trap 'tell USR1' USR1   # the walltime is nearly over: the program saves and ends by itself, and what it saved counts
trap on_end TERM
trap 'record $?' EXIT

# Take the attempt, or stop here: exit status 75 says that it belongs to another copy or was revoked.
exports=$(
  "$seal_python" -I @ROOT@/pisa/work/camp-719fd56a/payload/609afc80b0aa08577033bcbc65b10e0d0b55157a18ffe25202b574748620cc18/seal.py start --run @ROOT@/pisa/work/camp-719fd56a/runs/0001-1 --workdir @ROOT@/pisa/work/camp-719fd56a --data @ROOT@/pisa/data \
    --walltime 600 --job-id "${FLCTL_JOB_ID:-}" --nonce "$nonce"
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
  export HF_HUB_OFFLINE=1
  exec   @PYTHON@ @TRAINER@
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
