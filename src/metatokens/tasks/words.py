"""The words of the recall tasks: short, ordinary, lower-case English nouns, chosen here; nothing is downloaded.

No word has two roles: items and names share none, and neither holds a word of the sentences around them
(`SENTENCE_WORDS`), so a word alone tells what it stands for. The order matters: draws are indices into these lists, so
a change of the lists changes every instance.
"""

SENTENCE_WORDS = ("list", "item", "of", "is", "point", "to", "count", "bits", "parity", "text", "copy")

ITEMS = tuple(
    """
    acid acorn anchor ankle apple apron arch arm arrow ash axe badge bag ball banana band barn barrel basin basket
    bat bath battery beach bead beam bean bear beard bed bee beef bell belt bench bike bird blade blanket blood boat
    body bolt bone book boot bottle bow bowl box brain branch brass bread brick bridge broom brush bucket bulb bull
    bus bush butter button cabin cable cage cake calf camel camera candle candy cane canoe cap cape car card carpet
    carrot cart cat cave chain chair chalk cheese cherry chess chest chicken chin clam claw clay clock cloth cloud
    clover coal coat coin comb copper coral cord cork corn cotton couch cow crab cradle crane crate cream crown cube
    cup curtain dart deer desk diamond dice dish dog doll donkey door dove dress drill drop drum duck dust eagle ear
    earth egg elbow engine eye face fan feather fence fern fig film finger fire fish flag flame flask flea floor
    flour flower flute fly foam fog foot fork fox frame frog fruit fur garlic gate gear gift glass globe glove glue
    goat gold goose grain grape grass gravel guitar gun hair hammer hand hat hawk hay head heart heel helmet hen
    herb hill hip honey hood hook horn horse hose ice ink insect iron ivory jacket jam jar jaw jeans jelly jewel
    juice kettle key kite knee knife knot lace ladder lake lamb lamp leaf leather leg lemon lens letter lid light
    lime lion lip lizard lock log lunch lung magnet map maple marble mask mast match meal meat medal melon milk mint
    mirror mist mole moon moss moth mouse mouth mud mug mule nail neck needle nest net nose note nut oak oar oat oil
    olive onion orange oven owl ox page pail paint palm pan paper peach pear pearl pen pencil pepper piano pig pill
    pillow pin pine pipe plank plate plow plum pocket pond pony pot potato pump puppet purse quilt rabbit radio rail
    rain rat razor ribbon rice ring river road robe rock roof root rope rose ruby rug ruler sack saddle sail salad
    salt sand saw scale scarf seal seed shark sheep shell ship shirt shoe shovel silk silver sink skate skin skirt
    sky sled smoke snail snake snow soap sock sofa soup spade spider spoon spring squid stair stamp star steam steel
    stem step stick stone stool storm stove straw stream string sugar suit sun swan sword table tail tank tape tea
    tent thorn thread thumb tide tiger tile tin toad toast toe tomato tongue tool tooth torch towel toy train tray
    tree truck trumpet trunk tube tulip turkey turtle vase veil vest vine violin wagon wall watch water wave wax
    whale wheat wheel whip whistle wind window wine wing wire wolf wood wool worm yarn zebra
    """.split()  # noqa: SIM905 - one word a line otherwise
)
"""What lists hold and texts are made of: things, animals, plants and food."""

NAMES = tuple(
    """
    abbey academy actor agent airport alley artist attic author avenue baker bakery bank banker barber bay bishop
    border boxer boy bride broker brother builder butcher butler camp canal canyon capital captain castle cellar
    chapel chef chief child church cinema circus city clerk clinic club coach coast college colony corner cottage
    county court cousin cowboy critic crowd dancer daughter deacon dealer depot desert diner diver dock doctor
    driver duke embassy empire estate expert factory family farm farmer father field fisher forest fort friend
    garage garden giant girl grocer guard guest guide gym hall harbor hermit hero highway hospital hostel hotel
    house hunter inn island jail joker judge jungle jury king kingdom kitchen knight lab lady land lawyer leader
    legend library lobby lodge lord maid mall manor market marsh mason mayor meadow mill miller miner monk motel
    mother museum nation neighbor nephew niece nurse office orchard orphan outpost owner painter palace park parlor
    pastor patient peasant pilot pirate planet player plaza plumber poet police porch port porter prairie priest
    prince princess prison pupil queen ranch ranger reader region resort rider robber ruin runner sailor saint salon
    school scout senate servant shepherd sheriff shop shore singer sister soldier son spy square squire stadium
    station store street student studio suburb summit surgeon swamp tailor tavern teacher temple tenant terrace
    theater thief tower town trader tribe tunnel tutor twin uncle valley vendor viking villa village visitor waiter
    warden warrior widow wife witch wizard worker writer yard youth zone zoo
    """.split()  # noqa: SIM905 - one word a line otherwise
)
"""What lists are called: people and places."""
