"""The sentences that ``helpdesk`` puts together, for every role in three groups: train, validation and test.

``---`` separates the groups and ``|`` the wordings of a group; line ends count as spaces, braces are slots. A
wording stands in one group only and is clearly about its own topic: ``helpdesk`` adds the distractions.
"""

from typing import Final

SLOTS: Final[dict[str, tuple[str, ...]]] = {
    "device": ("laptop", "tablet", "workstation", "notebook", "desktop PC"),
    "app": ("Skylark Mail", "Quillbooks", "Fieldnote", "PaperTrail", "Orbit CRM", "Tessera"),
    "place": (
        "the Leeds office",
        "home",
        "the warehouse",
        "the third floor",
        "our Oslo branch",
        "the new site",
    ),
    "person": ("Amira", "Tom", "Priya", "Jonas", "Mrs Okafor", "the intern", "my manager"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    "month": ("January", "March", "April", "June", "September", "November"),
    "number": ("40", "17", "129", "86", "250", "63", "312"),
}

PROBLEMS: Final[dict[str, str]] = {
    "access": """
        I forgot my password for {app} and the reset mail never arrives | {app} says my user name or
        password is wrong although I typed it slowly three times | my account has been locked after too many
        attempts on {day} | I can't log in to {app} any more, it just shows the sign-in page again | the six
        digit code from the authenticator is refused every time | {person} needs a login for {app}, could
        you create one | I changed my phone and now I cannot approve the two-step prompt | please give
        {person} permission to open the shared {month} folder | my password expired while I was on leave and
        I am shut out of {app} | {app} tells me that I do not have the rights to view this page | could you
        unlock my user, I start work at {place} in ten minutes | the reset link says it is no longer valid
        and I still can't sign in | every time I enter my details {app} throws me back to the welcome screen
        | my PIN isn't recognised and after the last try it told me to contact an administrator | I used to
        be able to see the {month} reports, now it says access denied | could someone let {person} into the
        {app} workspace, the invitation was for an old address | the fingerprint prompt was lost with my old
        handset, so there is no way for me to get past the second factor | the person before me left and
        nobody knows the passphrase of the shared mailbox | single sign-on sends me round in circles between
        two pages
        ---
        {app} keeps rejecting my credentials since {day} | the verification text for signing in never comes
        to my phone | {person} has joined the team and still has no user name | the sign-in page does not
        take my password any longer | please unlock the account of {person} | I need permission to edit the
        {month} folder in {app}
        ---
        I am unable to sign in to {app}, my password is not accepted | could you reset the password of
        {person} for {app} | my user is blocked since {day} and I need it unlocked before the shift at
        {place} | the login code never reaches my new phone | {app} refuses my credentials even after I set
        a new password | {person} should get access rights to the {month} reports in {app} | please create
        user accounts for our {number} trainees | two-factor authentication is tied to a handset that I no
        longer own
        """,
    "billing": """
        I was charged twice for {month}, {number} euros each time | the invoice for {month} shows {number}
        seats but we only have a dozen | could you send me a copy of the {month} invoice for our accounts |
        my card was declined when I tried to pay for {app} | how do I change the credit card that you charge
        every month | the price on my bill went up to {number} without any notice | our VAT number is
        missing from the last invoice | why is there a fee of {number} on my statement | we paid by bank
        transfer on {day} but the invoice still shows as open | please put the purchase order number on our
        bill from {month} | the discount we agreed on is not on the invoice for {app} | I would like to get
        my money back for the extra {number} that was taken | {number} left my bank account on {day} and
        then the same amount again an hour later | our finance people want the tax shown separately in the
        {month} statement | you have us down for the premium tier, yet the quote said basic, so the total is
        off by {number} | a reminder says we owe {number}, which we settled weeks ago | from next quarter
        please debit the company's other account | when do we see the credit note for the overpaid {month}
        amount | the voucher was accepted at checkout but I still paid full price
        ---
        there is a payment of {number} on my card that I cannot explain | accounting asks for the receipt
        from {month} | can we pay for {app} once a year rather than monthly | please correct the amount on
        the {month} invoice | why was I charged {number} for a month that I had already paid
        ---
        there are two payments of {number} for the same month on my credit card statement | the total of the
        {month} invoice is wrong, it should be {number} | our accountant needs an invoice with the correct
        company name | I'd like to pay by direct debit and no longer by card | you billed us for {number}
        users though half of them left in {month} | we have received a payment reminder although the {month}
        bill was paid on time | please refund the {number} that was charged in error | what exactly is the
        surcharge of {number} on the latest bill
        """,
    "cancellation": """
        please cancel my subscription to {app} at the end of {month} | I want to close my account for good |
        we no longer need {app}, how do we end the contract | stop the automatic renewal please, I will not
        go on after {month} | I'd like to cancel before the trial of {app} runs out on {day} | we are moving
        to another supplier and want to terminate our agreement | where do I find the button to unsubscribe
        from the {app} plan | kindly confirm that my membership ends in {month} | what is the notice period
        if we want to leave {app} | delete my account and everything in it, I am not coming back | take
        {person} off the plan, that seat is not needed any more | I asked you in {month} to end my plan and
        it is still active | after {month} we won't be using {app}, so please wind things up | I've decided
        not to continue with you once the current period is over | what steps do I take to discontinue the
        service for {number} users | do not extend our arrangement for another year | we're shutting the
        branch, hence every licence there can go | can I drop {app} right away, or am I tied in until
        {month} | the free month is nearly over and I don't wish to carry on
        ---
        this is our notice to quit the {app} contract | how can I get out of the yearly plan early | I don't
        want my {app} plan to be renewed | please cancel everything we have booked with you | our contract
        for {app} should end in {month}
        ---
        I wish to cancel my {app} membership as of {month} | please terminate our contract for {app} with
        {number} users | how can I stop my {app} subscription from renewing in {month} | I want to end the
        free trial before it turns into a paid subscription | we have decided to leave {app}, please confirm
        that the contract ends in {month} | kindly close our customer account permanently | can the yearly
        subscription be ended before {month} | I no longer want the service and would like to unsubscribe
        """,
    "delivery": """
        my order from {day} has not arrived yet | where is my parcel, the tracking page has not changed
        since {day} | the courier left the box with a neighbour I do not know | I ordered {number} headsets
        and only half of them were in the package | the wrong item was delivered, I wanted a {device} and
        got a keyboard | can you send the package to {place} instead | when will the {device} I ordered be
        shipped | the driver says nobody was at home, but I waited all {day} | the box came torn open and
        the charger is not inside | could I change the delivery address for order {number} | the tracking
        number you gave me does not exist | it was promised for {day} and the shipment is still at the depot
        | it's a week past the date you promised and nothing has turned up at {place} | the carrier claims
        somebody signed for it, but none of us did | we got somebody else's goods in the consignment for
        {place} | is it possible to have it dropped off on {day} rather than during the week | I'd rather
        collect the {device} myself, which warehouse is it sitting in | according to the map the van has
        been standing in the same town for days | only {number} of the things we bought were in the crate,
        the rest wasn't
        ---
        the package was due on {day} and it is still not here | the shipment went to our old address | one
        of the {number} parcels is missing | has my order been shipped yet | the package arrived with the
        wrong {device} in it
        ---
        we are still waiting for the {device} that should have been here on {day} | tracking says delivered,
        but there is no parcel at {place} | you shipped {number} cables in place of the {device} we ordered
        | please tell me on which day my order will be delivered | I have moved, can the courier bring the
        parcel to {place} | part of the order is missing, the box held only the charger | the parcel was
        damaged on the way and the contents are broken | how long does shipping to {place} take for a
        {device}
        """,
    "hardware": """
        the screen of my {device} flickers and then goes black | my {device} does not turn on any more, not
        even the light | several keys on the keyboard are stuck | the battery of the {device} lasts less
        than {number} minutes | the fan makes a grinding noise as soon as I switch it on | I dropped my
        {device} and the display is cracked | the printer on {place} jams at every second sheet | the USB
        port on the left side does not recognise anything | the charger gets very hot and smells burnt | the
        microphone of my headset is dead since {day} | the docking station no longer finds the second
        monitor | coffee went over the keyboard of {person}'s {device} | pressing the power button of the
        {device} does nothing whatsoever | one hinge has snapped, so the lid won't stay up | the pages come
        out with grey streaks and the toner is new | the {device} only stays alive while it's plugged into
        the wall | no sound from either speaker, even with the volume all the way up | there's a purple
        stain in the corner of the panel and it's growing | the mouse of {person} clicks twice when you
        press it once
        ---
        the touchpad of my {device} stopped reacting | the webcam shows only a black picture | there are
        lines all across the monitor | the keyboard of my {device} has missing keys | my {device} makes a
        rattling noise and will not switch on
        ---
        the display of the {device} stays dark when I press the power button | my {device} is broken, it
        fell off the table on {day} | the battery no longer charges, it is stuck at {number} percent | some
        letters on my keyboard do not work | the printer at {place} makes a loud noise and prints nothing
        but black lines | my headset has a loose cable and the sound cuts out on one side | the external
        monitor has dead pixels all over | the {device} overheats and the fan never stops spinning
        """,
    "network": """
        the wifi at {place} drops every few minutes | I cannot connect to the VPN from {place} | there is no
        internet on the {device} although the cable is plugged in | the guest network asks for a code that
        nobody has | the router at {place} blinks red since {day} | I can open web pages but the shared
        drive cannot be reached | the VPN connects and disconnects right away | my {device} does not find
        the wireless network any more | we have had no connection on {place} since {day} | the signal in the
        meeting room is too weak for calls | the browser says DNS server not found for every site | remote
        desktop cannot reach the server at {place} | all of {place} has been offline since the electricians
        came on {day} | the {device} sees every hotspot in the building except ours | from {place} the
        intranet times out, while at my desk it loads | could someone run an ethernet line to the back room,
        there's hardly any reception | the secure tunnel refuses to come up when I'm travelling | we get an
        address conflict on {number} machines, so they can't get out to the web | video meetings break up
        with lost packets whenever I move to the kitchen
        ---
        nobody at {place} is online since the storm | the tunnel to the company network breaks off after
        {number} seconds | my {device} shows connected, no internet | the wifi in {place} is down again | no
        VPN connection is possible since {day}
        ---
        we have no internet access at {place} since {day} | the wireless connection on my {device} breaks
        off all the time | I am at {place} and the VPN does not connect | the network drive is not reachable
        from {place} | wifi is extremely weak at {place}, one bar at most | after the router was replaced
        {number} computers stayed offline | my {device} cannot join the office wifi | the VPN client reports
        that the server is unreachable
        """,
    "installation": """
        the installer of {app} stops at {number} percent with an error | please install {app} on my {device}
        | the update to the new version of {app} fails again and again | where can I download {app} for my
        {device} | I need admin rights to set up {app} | the licence key for {app} is not accepted during
        setup | after the upgrade {app} asks for a missing file and does not open | which version of {app}
        works with my operating system | how do I remove the old {app} before installing the new one | I
        need the printer driver for the {device} put on | the setup of {app} says there is not enough disk
        space | {person} got a new {device} and needs {app} on it | could {app} be put on {number} computers
        in the training room by {day} | halfway through the wizard it complains about a runtime component
        and rolls everything back | I've got the product code, yet the activation step keeps turning it down
        | is there a build of {app} for the newest system release | the package manager won't let me add the
        plug-in for {app} | {app} wants me to move to release 9 and then says it isn't compatible | the
        {device} was wiped and I'd like the usual programs on it again, starting with {app}
        ---
        the setup wizard of {app} closes without a message | can you roll out {app} to {number} machines |
        the latest patch for {app} will not apply | I cannot install {app}, the setup ends with an error |
        please update {app} on my {device}
        ---
        I would like to have {app} installed on {number} computers | the installation of {app} breaks off
        with an error message | updating {app} does not work, it says the version is not compatible | where
        do I get the setup file of {app} for a new {device} | {app} cannot be activated with the licence key
        I was given | can somebody with admin rights install the scanner driver on my {device} | the upgrade
        from the old {app} to the new one fails at {number} percent | please set up my new {device} with
        {app} and the usual software
        """,
    "recovery": """
        I deleted the {month} folder by mistake, can you restore it | all my files are gone after the
        {device} restarted | the spreadsheet from {day} was overwritten, I need the old version back | is
        there a backup of the shared drive from {month} | my mails from {month} have disappeared from {app}
        | the presentation is corrupt and does not open, can it be repaired | {person} emptied the recycle
        bin and the contracts were in it | the backup of my {device} has not run since {day} | I saved the
        report in {app} and today it is empty | please recover the data from my old {device} | {number}
        photos are missing from the project folder | the contacts vanished from {app} after the sync | I hit
        remove on the wrong directory and there were {number} drawings inside | is it possible to roll the
        {month} table back to how it looked on {day} | what I wrote in {app} on {day} simply isn't there any
        more | somebody moved or erased our templates and we'd like them retrieved | the disk of my {device}
        was formatted and the thesis of {person} was on it | the nightly copy hasn't been made for {number}
        days, what if something breaks | half of the calendar entries went missing when we switched phones
        ---
        can the files from {day} be recovered from the backup | {app} lost everything I entered on {day} |
        the last good copy of our database is needed | please restore the {month} documents from the backup
        | I removed a file by accident and need it again
        ---
        I accidentally deleted a folder with {number} documents, please restore it | can you bring back the
        documents that were lost on {day} | my notes in {app} have disappeared | somebody saved over our
        budget file, we need the earlier version of {day} | after the sync all my mails from {month} were
        lost | the hard disk was erased and I need the data on it back | our nightly backup has failed since
        {day} | the {month} report is damaged and can no longer be opened, can you rescue it
        """,
    "security": """
        I got a mail that asks for my password and I think it is phishing | I clicked on a link in a strange
        message, what should I do | the virus scanner found a trojan on my {device} | someone logged in to
        my account from another country on {day} | my {device} was stolen from the car at {place} | there is
        a message on the screen that all my files are encrypted and I must pay | {person} received a fake
        invoice that pretends to be from you | I lost a USB stick with customer data at {place} | is this
        mail from the bank real or a scam | my colleagues get spam that was sent from my address | a caller
        who said he was from support wanted to control my {device} | I sent the customer list to the wrong
        person by accident | somebody pretending to be the director told {person} to buy gift cards | I
        noticed activity at three in the morning on {day} that certainly wasn't me | a pop-up claims my
        {device} is infected and gives a number to ring | my bag with the work {device} in it has been taken
        on the train | the sender looks like {app} but the address is spelled with a zero, shall I report it
        | I typed my details into a page that turned out to be a forgery | salaries of {number} people were
        visible to everybody through a public link
        ---
        a suspicious attachment was opened on {person}'s {device} | I believe that my account has been
        hacked | unknown programs try to connect from my {device}, is it malware | is this message with a
        link to {app} phishing | {person} lost a {device} with private data on the train
        ---
        I received a suspicious mail with an attachment, is it a scam | I think someone has hacked my
        mailbox | {person} entered a password on a fake page | my antivirus reports malware on the {device}
        | the {device} with confidential data was stolen on {day} | there was an unknown login to {app} from
        abroad on {day} | spam messages are being sent in my name | a stranger on the phone asked {person}
        for the password, is that fraud
        """,
    "performance": """
        my {device} is very slow since {day} | {app} freezes whenever I open a large file | it takes
        {number} seconds to open a mail in {app} | {app} crashes several times a day | starting the {device}
        takes almost {number} minutes | the {device} hangs as soon as I share my screen | the memory is
        always full and everything is sluggish | {app} does not respond for minutes after I click on save |
        typing in {app} lags behind by a few seconds | the search in {app} is slow, it takes {number}
        seconds for a name | the whole {device} stutters when more than two programs are open | {app} closes
        by itself in the middle of my work | I can make tea while {app} brings up a single record | the
        cursor turns into an hourglass and {app} sits there doing nothing | since {day} the {device} crawls,
        even a text file needs {number} seconds | {app} quits without warning each time I attach something |
        scrolling is jerky and the processor is at a hundred percent all day | the overnight job in {app}
        used to last one hour and now needs {number} | {person}'s {device} locks up completely until it is
        switched off and on
        ---
        {app} needs ages to load a page | my {device} gets slower every day | {app} hangs and I have to end
        it with the task manager | opening a file in {app} is painfully slow | {app} crashed {number} times
        since {day}
        ---
        {app} is incredibly slow today | my {device} freezes several times an hour | {app} crashes as soon
        as I open the {month} file | the {device} needs {number} minutes to start up | everything I click in
        {app} takes {number} seconds to react | {app} keeps hanging and does not respond | my {device}
        became sluggish and the processor is always at full load | reports in {app} load far too slowly, I
        wait {number} seconds for each
        """,
}

MENTIONS: Final[dict[str, str]] = {
    "access": """
        my password reset | the locked account --- the new user name --- the login trouble | my sign-in code
        """,
    "billing": """
        the double charge | the {month} invoice --- the open payment --- the wrong amount | my credit note
        """,
    "cancellation": """
        the cancelled plan | ending the trial --- the notice --- our termination | leaving the service
        """,
    "delivery": """
        the late parcel | my missing order --- the shipment --- the lost consignment | the courier
        """,
    "hardware": """
        the broken screen | the dead battery --- the touchpad --- the cracked lid | the noisy printer
        """,
    "network": """
        the weak wifi | the VPN outage --- the router --- the bad reception | the cut cable
        """,
    "installation": """
        the failed update | the {app} setup --- the patch --- the missing plug-in | activating {app}
        """,
    "recovery": """
        the deleted folder | the backup --- the lost files --- the erased templates | the nightly copy
        """,
    "security": """
        the phishing mail | the virus alarm --- the malware scan --- the fraud attempt | the stolen badge
        """,
    "performance": """
        the slow {device} | the crash of {app} --- the freezing app --- the long waits | the jerky video
        """,
}

FRAMES: Final = """
    This has nothing to do with {mention}. | Thanks for fixing {mention} last week. | {person} will write to
    you about {mention}. | I know you are busy with {mention}. | I first thought it was because of
    {mention}, but that was something else. | Forget what I wrote about {mention}, that is solved.
    ---
    Please do not mix this up with {mention}. | You already took care of {mention}. | I asked about
    {mention} before, that one can be closed.
    ---
    My earlier ticket was on {mention}; that's all sorted. | A colleague is dealing with {mention}, so leave
    that aside. | It isn't related to {mention}, as far as I can tell. | Well done with {mention}, by the
    way.
"""

OPENINGS: Final = """
    Hello, | Hi there, | Good morning, | Dear support team, | Hey, | Hi, me again. | Sorry to bother you,
    but
    ---
    Good afternoon, | Hello team, | Quick one:
    ---
    Hiya, | To whom it may concern, | Good evening, | Morning all, | Apologies for the trouble:
"""

CONTEXTS: Final = """
    I work at {place} and share a desk with {person}. | We have been customers for {number} months. | I am
    in meetings until {day}. | {person} had the same thing last year. | I tried it again after lunch with
    the same result. | The quarter ends on {day} and everybody is nervous. | I already asked {person}, who
    did not know either. | I am writing from my phone because I am on the way to {place}.
    ---
    There are {number} of us at {place}. | I have a deadline on {day}. | {person} told me to write to you.
    ---
    Our team of {number} depends on this. | I'm standing in for {person} while they're away. | My working
    hours are odd this week, so ring before {day}. | It came up when {person} visited {place}. | I read
    through your help pages and didn't get any wiser.
"""

CLOSINGS: Final = """
    Thanks a lot! | Please help. | Kind regards, {person} | What can I do? | It is urgent. | Thank you in
    advance.
    ---
    Many thanks, {person} | Please call me back.
    ---
    Cheers, {person} | Any advice is welcome. | Would be great to hear from you by {day}. | Best wishes
"""
